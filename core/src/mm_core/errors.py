"""Every error mm-core raises on purpose.

    MMError
    ├── ConfigError              a setting or argument that cannot be used
    │   ├── NotBuiltError        a documented option that this release does not have yet
    │   ├── MissingExtraError    an optional dependency is not installed
    │   └── DatasetError         a benchmark's file of requests cannot be used
    ├── PluginError              a plugin broke the contract
    │   ├── PluginConflictError  two plugins claim the same thing
    │   └── UnsupportedModelError   no installed plugin serves the architecture
    ├── CheckpointError          a checkpoint cannot be read or does not fit the model
    ├── RequestError             one request is wrong; all others are unaffected
    │   ├── InvalidPromptError
    │   ├── InvalidParamsError
    │   ├── PlaceholderMismatchError
    │   ├── ContextLengthError
    │   ├── MediaError           an image, clip or video cannot be used
    │   │   ├── MediaDecodeError
    │   │   ├── MediaTooLargeError
    │   │   ├── TooManyMediaError
    │   │   ├── UnsupportedMediaError
    │   │   ├── MediaBlockedError   an address or path that may not be read
    │   │   └── MediaFetchError     an address that may be read, but could not be
    │   ├── MediaNotCachedError  a uuid without content whose content is gone
    │   ├── CacheFullError       more would be pinned than may be
    │   ├── InvalidGrammarError  a schema, expression or grammar that cannot be compiled in time
    │   └── RequestAbortedError
    ├── ServiceError             a server does not take the call; `status` is HTTP's
    │   ├── InvalidBodyError     400: no JSON, or of another shape
    │   ├── AuthenticationError  401
    │   ├── PermissionDeniedError   403
    │   ├── NotFoundError        404: a route or model
    │   ├── MethodNotAllowedError   405
    │   ├── ClientTimeoutError   408: the call was not sent in time
    │   ├── BodyTooLargeError    413
    │   ├── OverloadedError      429: too many wait; `retry_after` seconds
    │   ├── DrainingError        503: the server is about to stop
    │   └── RequestTimeoutError  504: the answer took too long
    ├── BatchError               some requests of a list failed; holds the others' results
    └── EngineError              the engine itself failed
        ├── EngineClosedError
        ├── EngineDiedError      its process ended; it is being started again
        └── OutOfMemoryError

A message says what was found, where, and what to do about it. `code` is stable once released
and is what a server puts in an error body. (`OutOfMemoryError` is not Python's `MemoryError`.)
"""

from __future__ import annotations

from typing import Any


class MMError(Exception):
    """Root of the tree. `code` names the error for programs; the text is for people."""

    code = "mm_error"


class ConfigError(MMError, ValueError):
    """A setting, argument or combination of them cannot be used."""

    code = "invalid_config"


class NotBuiltError(ConfigError, NotImplementedError):
    """A documented option that this release does not implement; never silently ignored."""

    code = "not_built"


class MissingExtraError(ConfigError):
    """An optional dependency is missing; the text holds the pip command."""

    code = "missing_extra"


class DatasetError(ConfigError):
    """A file of requests for a benchmark is absent or malformed; the text names file and line."""

    code = "invalid_dataset"


class PluginError(MMError):
    """A plugin broke the contract; the text names the plugin and the hook."""

    code = "plugin_error"


class PluginConflictError(PluginError):
    """Two plugins claim one name or architecture."""

    code = "plugin_conflict"


class UnsupportedModelError(PluginError):
    """No installed plugin claims the checkpoint's architecture."""

    code = "unsupported_model"


class CheckpointError(MMError):
    """A checkpoint is absent, incomplete, damaged, or does not fit the model."""

    code = "invalid_checkpoint"


class RequestError(MMError, ValueError):
    """One request cannot be served. `param` names the argument at fault, where there is one."""

    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidPromptError(RequestError):
    """The prompt is empty, not text, or holds token ids outside the vocabulary."""

    code = "invalid_prompt"


class InvalidParamsError(RequestError):
    """A sampling parameter is out of range or of the wrong type."""

    code = "invalid_params"


class PlaceholderMismatchError(RequestError):
    """The prompt's placeholders and the given media do not match in number or kind."""

    code = "media_placeholder_mismatch"


class ContextLengthError(RequestError):
    """Prompt and requested output do not fit the model's context."""

    code = "context_length_exceeded"


class MediaError(RequestError):
    """An image, clip or video cannot be used."""

    code = "invalid_media"


class MediaDecodeError(MediaError):
    """Encoded bytes are empty, truncated or not what any decoder reads. `code` says which kind."""

    code = "invalid_image"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param)
        if code is not None:
            self.code = code


class MediaTooLargeError(MediaError):
    """A ceiling on pixels, frames, samples or bytes, checked before the memory is taken.

    `code` is "image_too_large" for pictures, "audio_too_long" for sound.
    """

    code = "media_too_large"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param)
        if code is not None:
            self.code = code


class TooManyMediaError(MediaError):
    """More items than `limit_mm_per_prompt` allows; checked before anything is decoded."""

    code = "too_many_media"


class UnsupportedMediaError(MediaError):
    """A modality the family does not read, or a container or value type nobody reads."""

    code = "unsupported_media"


class MediaBlockedError(MediaError):
    """An address or a path that is not allowed to be read, or a kind of address that never is."""

    code = "url_blocked"


class MediaFetchError(MediaError):
    """An allowed address gave nothing usable in time."""

    code = "fetch_failed"


class MediaNotCachedError(RequestError):
    """A uuid came without content and its content is not (or no longer) cached. Send it again."""

    code = "media_not_cached"


class CacheFullError(RequestError):
    """More would be pinned in a cache than may be; the text names the cache, its bound and what to change."""

    code = "cache_full"


class InvalidGrammarError(RequestError):
    """A schema, regular expression or grammar is wrong, too large, or takes too long to compile."""

    code = "invalid_grammar"


class RequestAbortedError(RequestError):
    """The request was aborted before it finished."""

    code = "aborted"


class BatchError(MMError):
    """Some requests of a list failed; the others' results are kept.

    outputs: as long as the list, None where a request failed (results, where these were tasks). errors:
    index → what went wrong.
    """

    code = "batch_error"

    def __init__(self, outputs: list[Any], errors: dict[int, MMError]) -> None:
        index, first = next(iter(errors.items()))
        super().__init__(
            f"{len(errors)} of {len(outputs)} requests failed; the first is number {index}: {first} "
            "The finished ones are in this error's .outputs, all faults in .errors."
        )
        self.outputs = outputs
        self.errors = errors


class ServiceError(MMError):
    """A server does not take a call, whatever is in it. `status` is HTTP's; `headers` go with the reply."""

    code = "service_error"
    status = 500

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of the reply."""
        return {}


class InvalidBodyError(ServiceError):
    """The body is no JSON or multipart form, or has another shape than the route's."""

    code = "invalid_body"
    status = 400


class AuthenticationError(ServiceError):
    """No API key, or one that the server does not know."""

    code = "invalid_api_key"
    status = 401

    @property
    def headers(self) -> dict[str, str]:
        """What kind of key is wanted."""
        return {"WWW-Authenticate": "Bearer"}


class PermissionDeniedError(ServiceError):
    """A key that is known, but not for this route."""

    code = "permission_denied"
    status = 403


class NotFoundError(ServiceError):
    """No such route or model."""

    code = "not_found"
    status = 404

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param)
        if code is not None:
            self.code = code


class MethodNotAllowedError(ServiceError):
    """The route exists for other methods. allow: these."""

    code = "method_not_allowed"
    status = 405

    def __init__(self, message: str, *, allow: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.allow = allow

    @property
    def headers(self) -> dict[str, str]:
        """The methods that the route has."""
        return {"Allow": ", ".join(self.allow)}


class ClientTimeoutError(ServiceError):
    """The client did not send its call in time."""

    code = "request_timeout"
    status = 408


class BodyTooLargeError(ServiceError):
    """The body, or a part of it, is above a ceiling; nothing behind the ceiling was read."""

    code = "body_too_large"
    status = 413


class OverloadedError(ServiceError):
    """The queue is full. retry_after: seconds after which trying again may help."""

    code = "overloaded"
    status = 429

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """When to come back."""
        return {"Retry-After": str(self.retry_after)}


class DrainingError(OverloadedError):
    """The server finishes what runs and takes no more."""

    code = "draining"
    status = 503


class RequestTimeoutError(ServiceError):
    """The answer took longer than the server allows; its work was freed."""

    code = "timeout"
    status = 504


class EngineError(MMError):
    """The engine, not the request, is at fault."""

    code = "engine_error"


class EngineClosedError(EngineError):
    """The engine was closed."""

    code = "engine_closed"


class EngineDiedError(EngineError):
    """The engine's process ended, or hangs. What ran in it is lost; it is started again by itself."""

    code = "engine_died"


class OutOfMemoryError(EngineError):
    """The device has too little memory; the text names the setting to change."""

    code = "out_of_memory"
