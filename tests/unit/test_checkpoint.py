"""Opening checkpoints: directories, the hub, both config layouts, and nothing that runs code."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.hub import COMMIT, Hub, serve

from mm_core.checkpoint import open_checkpoint, resolve_dtype
from mm_core.errors import CheckpointError, ConfigError, MMError

HUB_CONFIG = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "hidden_size": 64,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vision_config": {"embed_dim": 32, "hidden_size": 64},
}
TF5_CONFIG = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "dtype": "bfloat16",
    "tie_word_embeddings": True,
    "text_config": {
        "hidden_size": 64,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
        "dtype": None,
    },
    "vision_config": {"embed_dim": 32, "hidden_size": 64},
}


def write(path: Path, config: object, **files: object) -> Path:
    path.mkdir(exist_ok=True)
    for name, value in {"config": config, **files}.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (path / f"{name}.json").write_text(text)
    return path


@pytest.mark.parametrize("config", [HUB_CONFIG, TF5_CONFIG], ids=["hub", "tf5"])
def test_both_layouts_give_one_flat_text_config(tmp_path, config):
    text = open_checkpoint(str(write(tmp_path / "m", config))).text_config
    assert text["hidden_size"] == 64
    assert text["rope_theta"] == 1000000.0
    assert text["rope_scaling"] == {"type": "mrope", "mrope_section": [2, 3, 3]}
    assert text["tie_word_embeddings"] is True
    assert "rope_parameters" not in text
    assert "vision_config" not in text


@pytest.mark.parametrize(
    ("given", "theta", "scaling"),
    [
        ({"rope_theta": 1e4}, 1e4, None),
        ({"rope_theta": 1e4, "rope_scaling": None}, 1e4, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_scaling": {"rope_type": "default", "type": "default", "mrope_section": [1]}, "rope_theta": 1e6},
         1e6, {"type": "mrope", "mrope_section": [1]}),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}},
         1e6, {"type": "yarn", "factor": 4.0}),
    ],
)  # fmt: skip
def test_rope_spellings(tmp_path, given, theta, scaling):
    text = open_checkpoint(str(write(tmp_path / "m", given))).text_config
    assert (text["rope_theta"], text["rope_scaling"]) == (theta, scaling)


def test_processor_settings_by_part(tmp_path):
    hub = write(
        tmp_path / "hub",
        HUB_CONFIG,
        preprocessor_config={"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "auto_map": {"a": "b"}},
        video_preprocessor_config={"fps": 2},
    )
    assert open_checkpoint(str(hub)).processor_config == {
        "image_processor": {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14},
        "video_processor": {"fps": 2},
    }
    tf5 = write(
        tmp_path / "tf5",
        TF5_CONFIG,
        processor_config={"image_processor": {"patch_size": 16}, "video_processor": {"fps": 1}, "processor_class": "X"},
        preprocessor_config={"patch_size": 14},
    )
    assert open_checkpoint(str(tf5)).processor_config == {
        "image_processor": {"patch_size": 16},
        "video_processor": {"fps": 1},
        "processor": {"processor_class": "X"},
    }
    audio = write(tmp_path / "audio", {}, preprocessor_config={"feature_extractor_type": "W", "sampling_rate": 16000})
    assert list(open_checkpoint(str(audio)).processor_config) == ["feature_extractor"]


def test_generation_config_and_read_json(tmp_path):
    checkpoint = open_checkpoint(str(write(tmp_path / "m", HUB_CONFIG, generation_config={"eos_token_id": [1, 2]})))
    assert checkpoint.generation_config == {"eos_token_id": [1, 2]}
    assert checkpoint.read_json("absent.json") is None
    assert checkpoint.architectures == ("Qwen2VLForConditionalGeneration",)
    for outside in ("../secret.json", "/etc/hostname"):
        with pytest.raises(CheckpointError, match="outside"):
            checkpoint.read_json(outside)
    with pytest.raises(CheckpointError, match="architectures"):
        _ = open_checkpoint(str(write(tmp_path / "n", {}))).architectures


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "not valid JSON"), ("[]", "not an object"), ("[" * 100_000, "not valid JSON"), ("\xff", "not valid JSON")],
)
def test_malformed_json_names_the_file(tmp_path, text, says):
    write(tmp_path / "m", "{}")
    (tmp_path / "m" / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=rf"config\.json.*{says}"):
        open_checkpoint(str(tmp_path / "m"))


def test_what_is_not_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(str(tmp_path / "absent"))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        open_checkpoint(str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match="Revisions belong to hub ids"):
        open_checkpoint(str(write(tmp_path / "m", {})), revision="main")
    for name in ("", "a\0b", "a/b/c"):
        with pytest.raises(CheckpointError):
            open_checkpoint(name)


def test_only_pickled_weights_are_refused(tmp_path):
    path = write(tmp_path / "m", HUB_CONFIG)
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model\.bin\).*Convert"):
        open_checkpoint(str(path))


def test_identity(tmp_path):
    def identity(name: str, config: object, weight: torch.Tensor) -> bytes:
        path = write(tmp_path / name, config)
        save_file({"w": weight}, path / "model.safetensors")
        return open_checkpoint(str(path)).identity

    ones = torch.ones(100)
    first = identity("a", HUB_CONFIG, ones)
    assert first == identity("b", HUB_CONFIG, ones)
    assert first != identity("c", {**HUB_CONFIG, "hidden_size": 128}, ones)
    assert first != identity("d", HUB_CONFIG, torch.ones(101))
    assert first != identity("e", HUB_CONFIG, ones * 2)  # a fine-tune: same names, other values


def test_resolve_dtype(tmp_path):
    hub = open_checkpoint(str(write(tmp_path / "hub", HUB_CONFIG)))
    tf5 = open_checkpoint(str(write(tmp_path / "tf5", TF5_CONFIG)))
    none = open_checkpoint(str(write(tmp_path / "none", {})))
    odd = open_checkpoint(str(write(tmp_path / "odd", {"dtype": "float8_e4m3fn"})))
    assert resolve_dtype("auto", hub, "cpu") is torch.float32
    assert resolve_dtype("bfloat16", hub, "cpu") is torch.bfloat16
    assert resolve_dtype("auto", hub, torch.device("cuda")) is torch.bfloat16
    assert resolve_dtype("auto", tf5, "cuda:0") is torch.bfloat16
    assert resolve_dtype("auto", none, "cuda") is torch.bfloat16
    assert resolve_dtype("float16", odd, "cuda") is torch.float16
    with pytest.raises(CheckpointError, match="float8_e4m3fn"):
        resolve_dtype("auto", odd, "cuda")
    with pytest.raises(ConfigError, match="int8"):
        resolve_dtype("int8", hub, "cpu")


# --- tokenizer and code inside checkpoints

CANARY = "from pathlib import Path\nPath(__file__).with_name('TOUCHED').touch()\nclass Evil: pass\n"


def word_tokenizer(path: Path, **settings: object) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "cat": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", **settings}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def test_auto_map_never_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    auto_map = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    path = write(
        tmp_path / "m",
        {**HUB_CONFIG, "model_type": "evil", "auto_map": auto_map, "text_config": {"auto_map": auto_map, "x": 1}},
    )
    (path / "evil.py").write_text(CANARY)
    word_tokenizer(path, auto_map=auto_map)
    checkpoint = open_checkpoint(str(path))
    assert "auto_map" not in checkpoint.config
    assert checkpoint.config["text_config"] == {"x": 1}
    tokenizer = checkpoint.tokenizer
    assert tokenizer.encode("a cat") == [1, 2]
    assert checkpoint.tokenizer is tokenizer
    assert not (path / "TOUCHED").exists()
    assert not list(tmp_path.rglob("TOUCHED"))
    assert not (tmp_path / "modules").exists()


def test_a_tokenizer_that_needs_code_is_refused(tmp_path):
    path = write(tmp_path / "m", {"model_type": "evil", "architectures": ["X"]})
    (path / "evil.py").write_text(CANARY)
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="tokenizer of"):
        _ = open_checkpoint(str(path)).tokenizer
    assert not list(tmp_path.rglob("TOUCHED"))


# --- the hub, by a stand-in on loopback

SCRIPT = """
import sys
from mm_core.checkpoint import open_checkpoint
from mm_core.errors import CheckpointError
try:
    c = open_checkpoint(sys.argv[1], revision=sys.argv[2] or None, show_progress=sys.argv[3] == "1")
except CheckpointError as error:
    print(error)
    sys.exit(1)
print(c.revision, c.config["hidden_size"], *sorted(str(p.relative_to(c.path)) for p in c.path.rglob("*")))
"""


def fetch(hub: Hub, home: Path, name: str, revision: str = "", progress: bool = False, **env: str):
    drop = ("HF_HUB_OFFLINE", "HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY")
    base = {k: v for k, v in os.environ.items() if k not in drop}
    base |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **env}
    command = [sys.executable, "-c", SCRIPT, name, revision, "1" if progress else "0"]
    return subprocess.run(command, env=base, capture_output=True, text=True, timeout=120)


def repo(**extra: bytes) -> dict[str, bytes]:
    return {
        "config.json": json.dumps({"hidden_size": 7}).encode(),
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"x",
        "merges.txt": b"x",
        "model.safetensors": b"\x02\0\0\0\0\0\0\0{}",
        "sub/config.json": b"{}",
        **extra,
    }


def test_hub_download_takes_settings_and_safetensors_only(tmp_path):
    files = repo(**{"pytorch_model.bin": b"\x80", "modeling_x.py": CANARY.encode(), "sub/evil.py": b"", "x.pt": b""})
    with serve(Hub({"org/model": files})) as hub:
        done = fetch(hub, tmp_path, "org/model")
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == ""  # show_progress=False is silent
        assert done.stdout.split() == [COMMIT, "7", "chat_template.jinja", "config.json", "merges.txt",
                                       "model.safetensors", "sub", "sub/config.json", "tokenizer.json"]  # fmt: skip
        assert not [path for path in hub.fetched() if path.endswith((".bin", ".py", ".pt"))]
        # What was downloaded once is found without the hub.
        again = fetch(hub, tmp_path, "org/model", HF_HUB_OFFLINE="1")
        assert again.stdout == done.stdout
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".bin", ".py", ".pt")]


def test_hub_progress_is_shown(tmp_path):
    with serve(Hub({"org/model": repo()})) as hub:
        done = fetch(hub, tmp_path, "org/model", progress=True)
    assert done.returncode == 0
    assert "%" in done.stderr


@pytest.mark.parametrize(
    ("name", "revision", "env", "says"),
    [
        ("org/absent", "", {}, "'org/absent' was not found on the hub"),
        ("org/model", "v9", {}, "at revision 'v9' has no such revision"),
        ("org/gated", "", {}, "is gated. Accept its terms"),
        ("org/model", "", {"HF_HUB_OFFLINE": "1"}, "cannot be reached"),
        ("org/model", "", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
        ("org/model", "", {"HF_HOME": "/proc/nowhere"}, "/proc/nowhere"),
    ],
)
def test_hub_errors_say_what_to_do(tmp_path, name, revision, env, says):
    with serve(Hub({"org/model": repo(), "org/gated": repo()}, gated=frozenset({"org/gated"}))) as hub:
        done = fetch(hub, tmp_path, name, revision, **env)
    assert done.returncode == 1, done.stderr
    assert says in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "does not fit on the disk. Free some space"),
        (PermissionError(errno.EACCES, "Permission denied"), "no permission"),
        (RuntimeError("odd\nsecond line"), r"could not be downloaded \(RuntimeError: odd\)\. Try again"),
    ],
)
def test_faults_of_this_machine(monkeypatch, fault, says):
    import huggingface_hub

    def fail(*what, **more):
        raise fault

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint("org/model")


def test_errors_belong_to_the_tree():
    assert issubclass(CheckpointError, MMError)
