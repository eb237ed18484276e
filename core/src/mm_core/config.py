"""Validated, frozen settings: of the engine, of its caches, and of one request's sampling."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mm_core.errors import ConfigError, InvalidGrammarError, InvalidParamsError, MMError
from mm_core.hashing import HashAlgorithm

MAX_N = 128
MAX_LOGPROBS = 64
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGPROB_TOKEN_IDS = 64
MAX_LOGITS_PROCESSORS = 16
MAX_SEED = 2**63 - 1
MAX_SCHEMA_BYTES = 64 * 1024
MAX_REGEX_BYTES = 8 * 1024
MAX_GRAMMAR_BYTES = 64 * 1024
MAX_CHOICES = 1000
MAX_CHOICE_BYTES = 64 * 1024  # all choices together
MAX_GRAMMAR_DEPTH = 64  # brackets within brackets

_FROZEN = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def describe(error: ValidationError, what: str) -> str:
    """One line a fault: which argument of `what`, what was given, what is wanted."""
    faults = []
    for fault in error.errors(include_url=False):
        name = ".".join(str(part) for part in fault["loc"] if not isinstance(part, str) or part.isidentifier())
        text = fault["msg"].removeprefix("Value error, ")
        try:
            given = repr(fault.get("input"))
        except RecursionError:  # nested without end
            given = "..."
        given = given if len(given) <= 80 else given[:77] + "..."
        if fault["type"] == "extra_forbidden":
            faults.append(f"{name!r} is not an option of {what}")
        else:
            faults.append(f"{name}={given}: {text[:1].lower()}{text[1:]}" if name else text)
    return f"{what}: " + "; ".join(faults) + "."


class Settings(BaseModel):
    """Base of all settings: strict types, no NaN, no unknown names, errors from the MMError tree."""

    model_config = _FROZEN

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise self._error()(describe(error, type(self).__name__)) from None

    @classmethod
    def _error(cls) -> type[MMError]:
        return ConfigError


Probability = Annotated[float, Field(gt=0.0, le=1.0)]


class StructuredOutput(Settings):
    """What an answer has to look like; exactly one of these. See docs/structured-output.md.

    json_schema: a JSON schema, as a mapping or as JSON text (kept as text). json_object: any JSON object. regex: an
    expression that the whole answer matches. choice: the answers there are. grammar: one in llguidance's Lark syntax.
    Sizes are bounded here; whether it can be compiled is found when the request is prepared. Both faults are
    InvalidGrammarError.
    """

    json_schema: str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] = ()
    grammar: str | None = None

    @classmethod
    def _error(cls) -> type[MMError]:
        return InvalidGrammarError

    @field_validator("json_schema", mode="before")
    @classmethod
    def _schema_as_text(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        try:
            return json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"no JSON can be made of it: {type(error).__name__}") from None

    @field_validator("choice", mode="before")
    @classmethod
    def _choice_as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else () if value is None else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [n for n in type(self).model_fields if getattr(self, n) not in (None, False, ())]
        if len(given) != 1:
            found = " and ".join(given) if given else "nothing"
            raise ValueError(f"has {found}; give one of json_schema, json_object, regex, choice and grammar")
        if len(self.choice) > MAX_CHOICES:
            raise ValueError(f"choice has {len(self.choice)} entries, the limit is {MAX_CHOICES}")
        if not all(self.choice):
            raise ValueError("choice has an empty entry; each needs a character at least")
        _check_size("choice", "".join(self.choice), MAX_CHOICE_BYTES)
        _check_text("json_schema", self.json_schema, MAX_SCHEMA_BYTES)
        _check_text("regex", self.regex, MAX_REGEX_BYTES)
        _check_text("grammar", self.grammar, MAX_GRAMMAR_BYTES)
        if self.json_schema is not None:
            _check_schema(self.json_schema)
        return self


def _check_size(name: str, text: str, limit: int) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half a surrogate pair, which is no character") from None
    if size > limit:
        raise ValueError(f"{name} has {size} bytes, the limit is {limit}")


def _check_text(name: str, text: str | None, limit: int) -> None:
    if text is None:
        return
    if not text:
        raise ValueError(f"{name} is empty")
    _check_size(name, text, limit)
    plain = re.sub(r'"(?:[^"\\]|\\.)*"', "", text, flags=re.DOTALL) if name == "json_schema" else text
    depth = deepest = 0
    for bracket in re.findall(r"[(\[{}\])]", plain):
        depth += 1 if bracket in "([{" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_GRAMMAR_DEPTH:
        raise ValueError(f"{name} nests {deepest} brackets, the limit is {MAX_GRAMMAR_DEPTH}")


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _check_schema(text: str) -> None:
    """JSON, an object, and nothing in it that lies elsewhere. Its depth is bounded already."""
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"json_schema is no JSON: {error}") from None
    except ValueError:
        raise ValueError("json_schema holds a number that is none in JSON, or one of thousands of digits") from None
    if not isinstance(schema, dict):
        raise ValueError("json_schema has to be a JSON object")
    try:
        json.dumps(schema, ensure_ascii=False).encode()  # as \\ud800 it is plain ASCII
    except UnicodeEncodeError:
        raise ValueError("json_schema holds half of a surrogate pair, which is no Unicode") from None
    left: list[Any] = [schema]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            for key in ("$ref", "$dynamicRef"):
                if isinstance(value.get(key), str) and not value[key].startswith("#"):
                    raise ValueError(f"json_schema has a {key} to something outside of it; only '#/…' is read")
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


class SamplingParams(Settings):
    """How one request's tokens are chosen. `max_tokens=None`: as far as the context goes.

    temperature: 0 is greedy; else logits are divided by it (values under 1e-2 count as 1e-2).
    top_k: 0 or -1 keeps all. min_p: drops tokens under min_p × the best token's probability.
    presence/frequency/repetition penalties: as vLLM and transformers define them, over output
    tokens (presence, frequency) and over prompt and output (repetition).
    logprobs: for each output token, the log-probabilities of that many best tokens and of the
    chosen one, under the model's own distribution (before any of the settings here).
    stop: strings; the text ends before the first of them unless include_stop_str_in_output.
    seed: makes the request's tokens repeatable, alone or in any batch.
    logprob_token_ids: tokens whose log-probabilities are reported beside those of `logprobs` (0 where that is
    None), at most 64.
    logits_processors: callables on the request's logits, `types.LogitsProcessor`, applied in order after
    logit_bias; min_tokens, penalties and temperature come after them. At most 16, hashable.
    structured: what the answer has to look like. Whatever else is set, no token is drawn that breaks it; the
    answer ends, whatever `ignore_eos` and `min_tokens` say, where nothing can follow.
    """

    n: Annotated[int, Field(ge=1, le=MAX_N)] = 1
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = 256
    min_tokens: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] = 1.0
    top_p: Probability = 1.0
    top_k: Annotated[int, Field(ge=-1, le=2**31)] = 0
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    logit_bias: Mapping[int, float] = Field(default_factory=dict)
    skip_special_tokens: bool = True
    logprob_token_ids: tuple[int, ...] = ()
    logits_processors: tuple[Any, ...] = ()
    structured: StructuredOutput | None = None

    @classmethod
    def _error(cls) -> type[MMError]:
        return InvalidParamsError

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_as_tuple(cls, value: Any) -> Any:
        if value is None:
            return ()
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    @field_validator("stop_token_ids", "logprob_token_ids", "logits_processors", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else () if value is None else value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _bias_keys(cls, value: Any) -> Any:
        if value is None:
            return {}
        if isinstance(value, Mapping):  # JSON has only str keys
            return {int(k) if isinstance(k, str) and k.isdigit() else k: v for k, v in value.items()}
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop has {len(self.stop)} strings, the limit is {MAX_STOP_STRINGS}")
        if any(not s or len(s) > MAX_STOP_LENGTH for s in self.stop):
            raise ValueError(f"each stop string needs 1 to {MAX_STOP_LENGTH} characters")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise ValueError(f"logit_bias has {len(self.logit_bias)} entries, the limit is {MAX_LOGIT_BIAS}")
        if any(not -100.0 <= v <= 100.0 for v in self.logit_bias.values()):
            raise ValueError("logit_bias values lie between -100 and 100")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise ValueError(f"stop_token_ids has {len(self.stop_token_ids)} ids, the limit is {MAX_STOP_TOKEN_IDS}")
        if len(self.logprob_token_ids) > MAX_LOGPROB_TOKEN_IDS:
            count = len(self.logprob_token_ids)
            raise ValueError(f"logprob_token_ids has {count} ids, the limit is {MAX_LOGPROB_TOKEN_IDS}")
        _check_processors(self.logits_processors)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")
        return self

    @property
    def greedy(self) -> bool:
        """Whether the best token is always taken."""
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether earlier tokens change the scores: only then does anybody read them."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def reads_tokens(self) -> bool:
        """Whether somebody reads earlier tokens."""
        return self.penalised or bool(self.logits_processors)

    @property
    def best_logprobs(self) -> int | None:
        """Log-probabilities of how many best tokens are reported; None: none are, not even the chosen one's."""
        return 0 if self.logprobs is None and self.logprob_token_ids else self.logprobs


def _check_processors(processors: tuple[Any, ...]) -> None:
    if len(processors) > MAX_LOGITS_PROCESSORS:
        raise ValueError(f"logits_processors has {len(processors)} entries, the limit is {MAX_LOGITS_PROCESSORS}")
    for processor in processors:
        kind = type(processor).__name__
        if not callable(processor):
            raise ValueError(f"logits_processors holds a {kind}; want callables (logits, rows) -> logits")
        try:
            hash(processor)
        except TypeError:
            raise ValueError(
                f"logits_processors holds a {kind} that cannot be hashed (equal ones of several requests are called "
                "once); make it a function, or a dataclass with frozen=True"
            ) from None


class KvCacheConfig(Settings):
    """The KV cache. `num_blocks` overrides the sizing by memory (tests, tight machines).

    free_gpu_memory_fraction: share of the memory left after the weights that goes to KV blocks.
    cpu_cache_size: bytes for KV blocks where there is no GPU.
    dtype: "auto" is the model's; "fp8" is e4m3 with a scale for each token and head, nearly twice the tokens.
    host_cache_size: bytes of host memory (pinned, for a GPU) for blocks and encoder rows that leave the device;
    0: none. host_cache_checksums: check each on its way back. disk_cache_path: directory for copies of those,
    which survive a restart, at most disk_cache_size bytes a model; needs host_cache_size. They are always checked.
    """

    enable_block_reuse: bool = True
    free_gpu_memory_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8"] = "auto"
    host_cache_size: Annotated[int, Field(ge=0)] = 0
    host_cache_checksums: bool = False
    disk_cache_path: str | None = None
    disk_cache_size: Annotated[int, Field(ge=2**20)] = 8 * 2**30
    block_size: Literal[16, 32, 64, 128] = 16
    num_blocks: Annotated[int, Field(ge=2)] | None = None
    cpu_cache_size: Annotated[int, Field(ge=2**20)] = 2**30

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.host_cache_size and not self.enable_block_reuse:
            raise ValueError(
                "host_cache_size keeps what is reused, and enable_block_reuse=False reuses nothing; leave one of them "
                "out"
            )
        if self.disk_cache_path is not None and not self.host_cache_size:
            raise ValueError(
                "disk_cache_path needs host_cache_size: blocks go to disk and come back by way of the host's memory; "
                "set it, e.g. host_cache_size=2 * 1024**3"
            )
        return self


class EngineConfig(Settings):
    """Everything `Engine.from_pretrained` accepts beside the model's name.

    max_num_batched_tokens: token budget of one step. encoder_budget: the encoder's budget of one
    step, in its own cost units (None: chosen from the token budget). encoder_cache_tokens: rows
    kept for reuse. processor_cache_size: bytes of preprocessed media kept on the host.
    preprocess_threads: None takes min(8, cores). max_image_pixels, max_video_frames, max_audio_seconds,
    max_encoded_bytes: of one item; max_decoded_bytes: of one request. decode_workers: processes that decode encoded
    media, each with decode_memory_bytes beside its libraries and decode_timeout_s for an item; 0: the threads do.
    overlap: schedule and launch a step while the one before it runs (None: on a GPU). cuda_graphs: replay decode
    steps as graphs on a GPU.
    engine_process: run the engine in a process of its own, see docs/processes.md; one that has work and takes no step
    for stall_timeout_s seconds is reported, and after twice that started again.
    record_timeline: keep what ran when, for `Engine.timeline()`. scheduling_policy: who starts first and what is
    kept, see docs/reuse.md: "reuse", or "fcfs" (first come, first served; the least recently used leaves).
    """

    revision: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kv_cache_config: KvCacheConfig = Field(default_factory=KvCacheConfig)
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    max_num_seqs: Annotated[int, Field(ge=1)] = 256
    max_num_batched_tokens: Annotated[int, Field(ge=1)] = 8192
    encoder_budget: Annotated[int, Field(ge=1)] | None = None
    encoder_cache_tokens: Annotated[int, Field(ge=1)] = 32768
    processor_cache_size: Annotated[int, Field(ge=0)] = 2**30
    preprocess_threads: Annotated[int, Field(ge=1, le=256)] | None = None
    limit_mm_per_prompt: Mapping[str, int] = Field(default_factory=dict)
    max_image_pixels: Annotated[int, Field(ge=1)] = 64 * 2**20
    max_video_frames: Annotated[int, Field(ge=1)] = 768
    max_audio_seconds: Annotated[float, Field(gt=0.0)] = 14400.0
    max_encoded_bytes: Annotated[int, Field(ge=1)] = 512 * 2**20
    max_decoded_bytes: Annotated[int, Field(ge=1)] = 16 * 2**30
    decode_workers: Annotated[int, Field(ge=0, le=64)] = 0
    decode_memory_bytes: Annotated[int, Field(ge=2**26)] = 2 * 2**30
    decode_timeout_s: Annotated[float, Field(gt=0.0, le=3600.0)] = 20.0
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    hash_algorithm: HashAlgorithm = "xxh3_128"
    scheduling_policy: Literal["reuse", "fcfs"] = "reuse"
    overlap: bool | None = None
    engine_process: bool = False
    stall_timeout_s: Annotated[float, Field(gt=0.0, le=86400.0)] = 60.0
    cuda_graphs: bool = True
    record_timeline: bool = False
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    show_progress: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        for modality, limit in self.limit_mm_per_prompt.items():
            if modality not in ("image", "video", "audio") or limit < 0:
                raise ValueError(f"limit_mm_per_prompt[{modality!r}]={limit}: want image, video or audio and 0 or more")
        return self
