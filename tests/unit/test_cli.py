"""The `mm` command: its tables, how arguments reach the engine, and how errors are told."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mm_core import zoo
from mm_core.cli import main
from mm_core.errors import CheckpointError, ConfigError
from mm_core.plugins import PluginInfo
from mm_core.types import CompletionOutput, RequestOutput, Usage

INFOS = [
    PluginInfo("bad", "mm-plugin-bad", "0.1", error="ImportError: no module"),
    PluginInfo("good", "mm-plugin-good", "1.0", ("good",), ("GoodModel",), ("image", "video"), ("mm_families",)),
]


@pytest.fixture
def infos(monkeypatch):
    def use(rows):
        monkeypatch.setattr("mm_core.cli.tables.PluginRegistry", lambda: type("R", (), {"describe": lambda _: rows})())

    use(INFOS)
    return use


def test_plugins_table(infos, capsys):
    assert main(["plugins"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["plugin", "version", "modalities", "architectures", "hooks"]
    assert lines[2].split() == ["bad", "0.1", "-", "failed", "to", "load", "-"]
    assert lines[3].split() == ["good", "1.0", "image,", "video", "GoodModel", "families"]
    assert lines[-1] == "bad 0.1 is not used: ImportError: no module"
    infos([])
    main(["plugins"])
    assert "pip install mm-plugin-qwen2vl" in capsys.readouterr().out


def test_plugins_json(infos, capsys):
    assert main(["plugins", "--json"]) == 0
    bad, good = json.loads(capsys.readouterr().out)
    assert bad["error"] == "ImportError: no module"
    assert good == {
        "name": "good", "distribution": "mm-plugin-good", "version": "1.0", "families": ["good"],
        "architectures": ["GoodModel"], "modalities": ["image", "video"], "hooks": ["mm_families"], "error": None,
    }  # fmt: skip


def test_env(infos, capsys):
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"mm-core", "python", "torch", "triton", "transformers", "gpu", "plugins"} <= set(facts)
    assert facts["plugins"] == "bad 0.1, good 1.0"
    assert main(["env"]) == 0
    assert "torch " in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv", [[], ["fly"], ["run"], ["run", "--what"], ["run", "m", "p", "extra"], ["plugins", "--jso"]]
)
def test_wrong_usage_is_exit_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: mm" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [["serve", "--prot", "8000"], ["chat", "--prot"], ["cache-sim", "--prot"], ["bench", "serve", "--prot"],
     ["bench", "checkpoint", "a", "b", "--prot"], ["env", "--prot"]],
)  # fmt: skip
def test_a_misspelt_option_gets_the_usage_of_its_command(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    command = " ".join(["mm", *argv[: 2 if argv[0] == "bench" else 1]])
    told = capsys.readouterr().err
    assert caught.value.code == 2
    assert told.startswith(f"usage: {command} ")
    assert told.endswith(f"\n{command}: error: unrecognized arguments: --prot\n")


# --- chat: what is refused before anybody is asked


@pytest.mark.parametrize(
    ("argv", "option", "other"),
    [(["http://127.0.0.1:1", "--device", "cpu"], "--device", "a model"),
     (["http://127.0.0.1:1", "--dtype", "auto"], "--dtype", "a model"),
     (["HTTPS://x", "--revision", "v1"], "--revision", "a model"),
     (["--model", "m"], "--model", "a URL"), (["org/model", "--api-key", "k"], "--api-key", "a URL")],
)  # fmt: skip
def test_chat_options_that_would_do_nothing(argv, option, other, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["chat", *argv])
    assert caught.value.code == 2
    assert f"mm chat: error: {option} goes with {other}" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["127.0.0.1:8000", "localhost:8000/v1", "[::1]:80", "gpu-1.example:9"])
def test_chat_with_an_address_without_its_scheme(target, capsys):
    assert main(["chat", target]) == 1
    assert f"write http://{target}.\n" in capsys.readouterr().err


def test_chat_with_a_model_whose_path_looks_like_an_address(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model:1").mkdir()
    monkeypatch.setattr(engine, "close", lambda self: None, raising=False)
    with Path("/dev/null").open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert main(["chat", "model:1"]) == 0
    assert (engine.seen["model"], engine.seen["device"], engine.seen["dtype"]) == ("model:1", "auto", "auto")


# --- run, with a stand-in for the engine


def output(text: str, finished: bool = True) -> RequestOutput:
    return RequestOutput("r", (1, 2), (CompletionOutput(0, text, (3,)),), Usage(12, 4, 3, 6, 6), finished)


class FakeEngine:
    seen: dict

    @classmethod
    def from_pretrained(cls, model, **options):
        cls.seen = {"model": model, **options}
        if model == "broken":
            raise CheckpointError("'broken' has no config.json.\nGive another.")
        if model == "interrupted":
            raise KeyboardInterrupt
        return cls()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.seen["closed"] = True

    def generate(self, prompt, params):
        self.seen |= {"prompt": prompt, "params": params}
        return [output("a red cat")]

    def stream(self, prompt, params):
        self.seen |= {"prompt": prompt, "params": params}
        yield output("a", finished=False)
        yield output("a red", finished=False)
        yield output("a red cat")


@pytest.fixture
def engine(monkeypatch):
    module = ModuleType("mm_core.engine.engine")
    module.Engine = FakeEngine
    monkeypatch.setitem(sys.modules, "mm_core.engine.engine", module)
    monkeypatch.setattr("mm_core.cli.run.default_model", lambda: Path("/zoo/nano"))
    return FakeEngine


def test_run_answers_and_tells_usage(engine, capsys):
    assert main(["run", "org/model", "What is this?", "--image", "a.png", "--image", "b.png", "--max-tokens", "9"]) == 0
    out, err = capsys.readouterr()
    assert out == "a red cat\n"
    assert err.startswith("[prompt 12 tokens (4 cached, 6 of media) · completion 3 tokens · ")
    seen = engine.seen
    assert (seen["model"], seen["closed"], seen["device"], seen["dtype"]) == ("org/model", True, "auto", "auto")
    assert seen["prompt"].prompt == "What is this?"
    assert seen["prompt"].multi_modal_data == {"image": [Path("a.png"), Path("b.png")]}
    assert (seen["params"].max_tokens, seen["params"].temperature) == (9, 0.0)
    assert seen["kv_cache_config"].enable_block_reuse is True


def test_run_streams(engine, capsys):
    assert main(["run", "m", "p", "--stream"]) == 0
    assert capsys.readouterr().out == "a red cat\n"


@pytest.mark.parametrize(
    ("argv", "model", "prompt"),
    [
        (["p"], "/zoo/nano", "p"),
        (["--prompt", "p"], "/zoo/nano", "p"),
        (["m", "--prompt", "p"], "m", "p"),
        (["--model-dir", "d", "p"], "d", "p"),
        (["--model-dir", "d", "--prompt", "p"], "d", "p"),
    ],
)
def test_ways_to_name_model_and_prompt(engine, argv, model, prompt):
    assert main(["run", *argv]) == 0
    assert (engine.seen["model"], engine.seen["prompt"].prompt) == (model, prompt)


@pytest.mark.parametrize(
    ("argv", "data"),
    [
        ([], None),
        (["--modality", "text"], None),
        (["--modality", "image", "--media", "a", "b"], {"image": [Path("a"), Path("b")]}),
        (["--media", "a.PNG", "b.mp4"], {"image": [Path("a.PNG")], "video": [Path("b.mp4")]}),
        (["--video", "v.mp4"], {"video": [Path("v.mp4")]}),
        (["--image", "data:image/png;base64,AA"], {"image": ["data:image/png;base64,AA"]}),
    ],
)
def test_media(engine, argv, data):
    assert main(["run", "m", "p", *argv]) == 0
    assert engine.seen["prompt"].multi_modal_data == data


@pytest.mark.parametrize(
    "argv",
    [
        ["--media", "what"],
        ["--modality", "text", "--media", "a.png"],
        ["--modality", "text", "--image", "a.png"],
        ["--modality", "image", "--video", "v.mp4"],
    ],
)
def test_media_that_contradict_are_wrong_usage(engine, argv):
    with pytest.raises(SystemExit) as caught:
        main(["run", "m", "p", *argv])
    assert caught.value.code == 2


def test_run_settings(engine):
    options = ["--disable-kv-cache-reuse", "--dtype", "bfloat16", "--device", "cpu", "--revision", "v1", "--seed", "3"]
    assert main(["run", "m", "p", "--temperature", "0.5", *options]) == 0
    seen = engine.seen
    assert (seen["dtype"], seen["device"], seen["revision"]) == ("bfloat16", "cpu", "v1")
    assert seen["kv_cache_config"].enable_block_reuse is False
    assert (seen["params"].temperature, seen["params"].seed) == (0.5, 3)


def test_errors_are_one_line(engine, capsys):
    assert main(["run", "broken", "p"]) == 1
    assert capsys.readouterr().err == "mm: error: 'broken' has no config.json. Give another.\n"
    assert main(["run", "m", "p", "--max-tokens", "0"]) == 1
    assert "max_tokens=0" in capsys.readouterr().err
    assert main(["run", "interrupted", "p"]) == 130


# --- the zoo


def test_zoo_model_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv(zoo.ZOO_VARIABLE, str(tmp_path))
    with pytest.raises(ConfigError, match=r"Name a model.*MM_ZOO"):
        zoo.default_model()
    (tmp_path / zoo.DEFAULT_MODEL).mkdir()
    (tmp_path / zoo.DEFAULT_MODEL / "config.json").write_text("{}")
    assert zoo.default_model() == tmp_path / zoo.DEFAULT_MODEL


def test_zoo_is_searched_upwards(tmp_path, monkeypatch):
    monkeypatch.delenv(zoo.ZOO_VARIABLE, raising=False)
    model = tmp_path / "zoo" / "some-model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "er")
    assert zoo.find_model("some-model") == model
