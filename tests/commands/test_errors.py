"""A mistake costs one line, and nothing is trained or overwritten."""

import re
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from lightning_dsmoe.cli import TRAINING
from lightning_dsmoe.commands.errors import OneLineErrors, one_line
from lightning_dsmoe.routing import SelectionPlan, TopK

pytestmark = pytest.mark.slow

MODEL = "--model.init_args."
ATTENTION = f"{MODEL}attention.init_args."
FEED_FORWARD = f"{MODEL}feed_forward.init_args."
COMPILE = (
    "--trainer.callbacks+=SparseCompile",
    "--trainer.callbacks.plan.experts=TopK",
)

MISTAKES = {
    "top_0": ([f"{MODEL}expert_selection=TopK", f"{MODEL}expert_selection.k=0"], ["k=0", "k >= 1"]),
    "top_99": (
        [f"{MODEL}expert_selection=TopK", f"{MODEL}expert_selection.k=99"],
        ["k=99", "k <= 18"],
    ),
    "top_99_compiled": (
        [*COMPILE, "--trainer.callbacks.name=other", "--trainer.callbacks.plan.experts.k=99"],
        ["k=99", "k <= 18"],
    ),
    "negative_threshold": (
        [f"{MODEL}attention_selection=Threshold", f"{MODEL}attention_selection.eps=-0.5"],
        ["eps=-0.5", "0 <= eps"],
    ),
    "heads": (
        [
            f"{MODEL}attention=GroupedQueryAttention",
            *(f"{ATTENTION}{size}" for size in ("n_heads=4", "n_kv_heads=3", "d_head=4")),
        ],
        ["n_kv_heads must divide n_heads", "n_heads=4", "n_kv_heads=3"],
    ),
    "odd_rotary": ([f"{ATTENTION}d_head=5"], ["even d_head", "d_head=5"]),
    "negative_weight": ([f"{MODEL}expert_mi_weight=-1"], ["expert_mi=-1.0", "0 or more"]),
    "no_experts": ([f"{FEED_FORWARD}n_experts=-1"], ["n_experts >= 1", "-1"]),
    "no_context": (["--data.init_args.context=0"], ["context must be at least 1, got 0"]),
    "callback_without_options": (
        ["--trainer.callbacks+=SparsityTarget"],
        ["SparsityTarget needs expert_top_k, attention_top_k or both"],
    ),
    "router": (
        [f"{FEED_FORWARD}router=NoRouter"],
        ["model.feed_forward.router", "NoRouter", "known classes: "],
    ),
    "router_module": (
        [f"{FEED_FORWARD}router=no.such.Router"],
        ["no.such.Router", "known classes: "],
    ),
    "router_of_module": (
        [f"{FEED_FORWARD}router=lightning_dsmoe.routing.Absent"],
        ["lightning_dsmoe.routing.Absent", "known classes: "],
    ),
    "router_of_other_kind": (
        [f"{FEED_FORWARD}router=torch.nn.Linear"],
        ["torch.nn.Linear", "subclass of Router", "known classes: "],
    ),
    "experts": ([f"{FEED_FORWARD}experts=NoExperts"], ["NoExperts", "GLUExperts, MLPExperts"]),
    "attention": ([f"{MODEL}attention=NoAttention"], ["NoAttention", "GroupedQueryAttention"]),
    "feed_forward": ([f"{MODEL}feed_forward=NoLayer"], ["NoLayer", "FeedForward"]),
    "norm": ([f"{MODEL}norm=NoNorm"], ["NoNorm", "torch.nn.RMSNorm"]),
    "selection": ([f"{MODEL}expert_selection=TopQ"], ["TopQ", "Threshold, ThresholdTopK, TopK"]),
    "selection_of_a_plan": (
        ["--trainer.callbacks+=SparseCompile", "--trainer.callbacks.plan.experts=TopQ"],
        ["TopQ", "Threshold, ThresholdTopK, TopK"],
    ),
    "optimizer": ([f"{MODEL}optimizer=AdamWW"], ["no such class: AdamWW", "nearest of", "AdamW"]),
    "schedule": (
        [f"{MODEL}lr_scheduler=LinearWarmCosine"],
        ["LinearWarmCosine; the nearest", "LinearWarmupCosine"],
    ),
    "callback": (
        ["--trainer.callbacks+=SparseEvaluaton"],
        ["SparseEvaluaton; the nearest of ", " known classes: SparseEvaluation, SparseCompile, "],
    ),
    "data": (["--data=NoData"], ["NoData", "TextDataModule"]),
    "option_of_a_part": (
        [f"{FEED_FORWARD}n_expert=3"],
        ["model.feed_forward", "'n_expert'", "MixtureOfExperts has n_experts, d_expert, router"],
    ),
    "option_of_a_router": (
        [f"{FEED_FORWARD}router=MLPRouter", f"{FEED_FORWARD}router.init_args.d_hiden=3"],
        ["'d_hiden'", "MLPRouter has d_hidden, init_std"],
    ),
    "option": (["--nope=3"], ["--nope=3"]),
    "option_of_the_trainer": (
        ["--trainer.max_stepz=3"],
        ["--trainer.max_stepz=3; did you mean trainer.max_steps or "],
    ),
    "layers": ([f"{MODEL}n_layers=0"], ["n_layers", "must be at least 1, got "]),
    "number": (["--trainer.max_steps=abc"], ["trainer.max_steps", "int", "abc"]),
    "union": (
        ["--trainer.precision=bf17"],
        ["trainer.precision: expected 64, 32, 16, ", "'bf16-mixed'", " or 'bf16', got bf17"],
    ),
    # Python caches unions, so the order of this one depends on what was imported before.
    "numbers": (["--trainer.limit_val_batches=viel"], ["expected ", "int", " or ", "got viel"]),
    "processes": (["--trainer.devices=999", "--trainer.accelerator=cpu"], ["999 processes on"]),
    "choice": ([f"{FEED_FORWARD}gate_scale=big"], ["expected 'mean_one' or 'sum_to_one', got big"]),
    "quantization": (
        [*COMPILE, "--trainer.callbacks.plan.experts.k=1", "--trainer.callbacks.quantization=int4"],
        ["quantization", "'int8'", "int4"],
    ),
    "configuration": (["-c", "absent.yaml"], ["absent.yaml", "does not exist"]),
    "files": (["--data.init_args.files=absent.txt"], ["there is no file 'absent.txt'"]),
    "checkpoint": (["--ckpt_path=absent.ckpt"], ["absent.ckpt", "not found"]),
}


def check(outcome: Any, named: list[str]) -> None:
    assert outcome.code in (1, 2)
    assert len(outcome.errors) == 1, outcome.err
    assert "Traceback" not in outcome.err
    # What a parser says of all readings of a value, rather than of the mistake.
    assert not re.search(r"Does not validate|Subtypes|NoneType|Namespace\(", outcome.errors[0])
    for part in named:
        assert part in outcome.errors[0]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_options(
    mistake: str, cli: Any, config: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words, named = MISTAKES[mistake]
    check(cli("fit", "-c", config("quickstart.yaml"), *tiny(tmp_path), *words), named)
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not list(tmp_path.rglob("sparse"))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", ["corpus is empty", "0 bytes"]),
        (b"text\0" * 400, ["not a text file", "NUL byte at offset 4"]),
        (b"text \xff" * 400, ["not a text file", "invalid UTF-8 at byte offset 5"]),
        (b"text", ["split has", "needs at least 17"]),
    ],
    ids=["empty", "nul", "latin_1", "short"],
)
def test_corpus(
    content: bytes, named: list[str], cli: Any, config: Any, tiny: Any, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(content)
    words = ["fit", "-c", config("quickstart.yaml"), *tiny(tmp_path)]
    check(cli(*words, f"--data.init_args.files={corpus}"), named)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.fixture(scope="module")
def bad_checkpoints(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    whole = Path(trained.checkpoint).read_bytes()
    (folder / "truncated.ckpt").write_bytes(whole[: len(whole) // 2])
    (folder / "text.ckpt").write_text("hello")
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, folder / "other.ckpt")
    torch.save({**torch.load(trained.checkpoint), "code": Path}, folder / "code.ckpt")
    return folder


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("truncated.ckpt", ["truncated.ckpt is damaged"]),
        ("text.ckpt", ["text.ckpt is damaged or not a checkpoint"]),
        ("other.ckpt", ["not a checkpoint of DSMoELanguageModel"]),
        ("code.ckpt", ["code.ckpt holds more than data, ", "pathlib"]),
    ],
)
def test_checkpoints(
    name: str, named: list[str], bad_checkpoints: Path, trained: Any, cli: Any, tmp_path: Path
) -> None:
    path = bad_checkpoints / name
    save_dir = f"--trainer.logger.init_args.save_dir={tmp_path}"
    for command in ("fit", "test") if name == "truncated.ckpt" else ("fit",):
        check(cli(command, *trained.words, save_dir, f"--ckpt_path={path}"), named)
    check(cli("generate", f"--ckpt={path}"), named)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("command", ["fit", "test"])
def test_checkpoint_of_another_shape(command: str, cli: Any, trained: Any, tmp_path: Path) -> None:
    before = Path(trained.checkpoint).read_bytes()
    words = [*trained.words, f"{MODEL}d_model=32", f"{FEED_FORWARD}n_experts=8"]
    save_dir = f"--trainer.logger.init_args.save_dir={tmp_path}"
    outcome = cli(command, *words, save_dir, f"--ckpt_path={trained.checkpoint}")
    check(outcome, ["another model", "d_model was 16, is 32", "n_experts was 18, is 8"])
    assert not list(tmp_path.rglob("*.ckpt"))
    assert Path(trained.checkpoint).read_bytes() == before


def test_plan_of_another_model(
    cli: Any, config: Any, tiny: Any, trained: Any, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    SelectionPlan(layers={"blocks.4.feed_forward": TopK(1)}).save(path)
    named = ["no routed layer 'blocks.4.feed_forward'"]
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        "trainer:\n  callbacks+:\n    - class_path: SparseCompile\n"
        f"      init_args: {{plan: {path}, name: other}}\n"
    )
    words = ["fit", "-c", config("quickstart.yaml"), "-c", str(overlay), *tiny(tmp_path)]
    check(cli(*words), ["SparseCompile", *named])
    check(cli("generate", f"--artifact={trained.artifact}", f"--plan={path}"), named)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_artifact_with_a_flipped_byte(cli: Any, trained: Any, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    shutil.copytree(trained.artifact, artifact)
    weights = bytearray((artifact / "model.safetensors").read_bytes())
    weights[-7] ^= 1
    (artifact / "model.safetensors").write_bytes(weights)
    named = [str(artifact), "was changed", "model.safetensors"]
    check(cli("generate", f"--artifact={artifact}"), named)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], ["either --ckpt or --artifact"]),
        (["--ckpt={checkpoint}", "--artifact={artifact}"], ["either --ckpt or --artifact"]),
        (["--artifact=absent"], ["absent: not a directory"]),
        (["--ckpt=absent.ckpt"], ["no checkpoint at absent.ckpt"]),
        (["--ckpt={checkpoint}", f"--prompt={'x' * 17}"], ["17 tokens", "context holds 16"]),
        (["--ckpt={checkpoint}", "--prompt="], ["a token or more"]),
        (["--ckpt={checkpoint}", "--prompt=a\udcff"], [r"'\udcff' at position 1", "not UTF-8"]),
        (["--ckpt={checkpoint}", "--temperature=-1"], ["temperature must be 0 or from", "-1"]),
        (["--ckpt={checkpoint}", "--temperature=warm"], ["temperature", "float", "warm"]),
        (["--ckpt={checkpoint}", "--top_k=0"], ["top_k must be at least 1", "0"]),
        (["--ckpt={checkpoint}", "--top_p=2"], ["top_p must be", "2.0"]),
        (["--ckpt={checkpoint}", "--stop="], ["stop must be", "''"]),
        (["--nope=1"], ["--nope=1"]),
    ],
)
def test_generate(words: list[str], named: list[str], cli: Any, trained: Any) -> None:
    given = {"checkpoint": trained.checkpoint, "artifact": trained.artifact}
    outcome = cli("generate", *(word.format(**given) for word in words))
    check(outcome, named)
    assert outcome.out == ""


def test_an_option_of_a_configuration_that_there_is_not(
    cli: Any, config: Any, tiny: Any, tmp_path: Path
) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("trainer: {max_stepz: 3}\n")
    words = ["fit", "-c", config("quickstart.yaml"), "-c", str(overlay), *tiny(tmp_path)]
    check(cli(*words), ["'trainer.max_stepz'; did you mean trainer.max_steps or "])


@pytest.mark.parametrize("command", TRAINING)
def test_training_without_a_configuration_says_how_to_give_one(command: str, cli: Any) -> None:
    check(cli(command), [f"{command} -c FILE.yaml", "configs lists"])


def test_tools_name_required_options_as_they_are_typed(cli: Any) -> None:
    check(cli("prune", "--ckpt_path=absent.ckpt"), ["options are required: --plan"])
    check(cli("calibrate", "--budgt=1"), ["--budgt=1; did you mean budget?"])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["sweep", "last.ckpt"], ["each value follows its option, such as --ckpt_path"]),
        (["configs", "quickstart.yaml"], ["each value follows its option, such as --name"]),
        (["compile", "--ckpt_path={checkpoint}", "--plan=absent"], ["no plan at absent"]),
        (
            ["compile", "--ckpt_path={checkpoint}", "--plan={artifact}"],
            ["is a folder; its plan is", "plan.json"],
        ),
        (["sweep", "--ckpt_path={folder}"], ["a folder with checkpoints, such as ", "last.ckpt"]),
        (["sweep", "--ckpt_path={artifact}"], ["a sparse model or one of transformers, not"]),
        (["consolidate", "--ckpt_path={checkpoint}"], ["is one file already"]),
    ],
)
def test_what_was_meant(
    words: list[str], named: list[str], cli: Any, trained: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {
        "checkpoint": trained.checkpoint,
        "artifact": trained.artifact,
        "folder": trained.folder,
    }
    check(cli(*(word.format(**given) for word in words)), named)
    assert not list(tmp_path.iterdir())


def test_a_budget_out_of_range_is_refused_before_anything_is_read(cli: Any) -> None:
    for budget in ("2", "0", "-1"):
        outcome = cli("calibrate", "--ckpt_path=absent.ckpt", f"--budget={budget}")
        check(outcome, ["budget must be a share above 0 and at most 1, got"])


PLACES = {
    "calibrate": ["--ckpt_path=absent.ckpt", "--budget=0.5"],
    "prune": ["--ckpt_path=absent.ckpt", "--plan=absent.json"],
    "compile": ["--ckpt_path=absent.ckpt", "--plan=absent.json"],
    "consolidate": ["--ckpt_path=absent.ckpt"],
    "report": ["--ckpt_path=absent.ckpt"],
    "export": ["--ckpt_path=absent.ckpt"],
    "sweep": ["--ckpt_path=absent.ckpt"],
    "import": ["--from=absent"],
    "upcycle": ["--from=absent", "--n_experts=2"],
    "evaluate": ["--ckpt_path=absent.ckpt", "--text=absent.txt"],
}


@pytest.mark.parametrize("command", PLACES)
def test_a_place_that_cannot_be_written_is_found_first(
    command: str, cli: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    output = f"{tmp_path}/file/folder/result"
    words = [*PLACES[command], f"--output={output}"]
    check(cli(command, *words), [f"{output} cannot be written: {tmp_path}/file: Not a directory"])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sweep", "output must name a folder, got ''"),
        ("import", "output must be a file, '' is a folder"),
        ("consolidate", "output must be a file, '' is a folder"),
        ("prune", ". exists and is not a sparse model"),
    ],
)
def test_an_output_without_a_name(
    command: str, message: str, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check(cli(command, *PLACES[command], "--output="), [message])
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_read_is_refused(cli: Any, trained: Any) -> None:
    words = ["calibrate", f"--ckpt_path={trained.checkpoint}", "--budget=0.5"]
    check(cli(*words, f"--output={trained.checkpoint}"), ["last.ckpt, which would be lost"])
    assert Path(trained.checkpoint).stat().st_size > 10_000


def test_unknown_command(cli: Any) -> None:
    check(cli("fitt"), ["'fitt'", "fit, validate, test, predict, upcycle, import, export"])
    check(cli("configs", "--name=absent.yaml"), ["absent.yaml", "quickstart.yaml"])


@pytest.mark.parametrize("debug", ["--debug", "JSONARGPARSE_DEBUG"])
def test_traceback_when_asked_for(debug: str, cli: Any, config: Any) -> None:
    words = ["fit", "-c", config("quickstart.yaml"), "--trainer.max_steps=abc"]
    tool = ["generate", "--ckpt=absent.ckpt"]
    environment = {}
    if debug == "--debug":
        words, tool = [*words, debug], [debug, *tool]
    else:
        environment[debug] = "true"
    with pytest.raises(Exception, match=r"max_steps[\s\S]*Got value: abc"):
        cli(*words, environment=environment)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at absent\.ckpt"):
        cli(*tool, environment=environment)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("k must be at least 1, got 0", "k must be at least 1, got 0"),
        (
            "'utf-8' codec can't encode character '\\udcff' in position 9: surrogates not allowed",
            "not UTF-8, character '\\udcff' in position 9",
        ),
        ("first line\n\x1b[1msecond\x1b[0m\n  line", "first line second line"),
    ],
)
def test_one_line(message: str, line: str) -> None:
    assert one_line(message) == line


class Part:
    def __init__(self, size: int | None = None, scale: float = 1.0) -> None:
        self.size, self.scale = size, scale


class Whole:
    def __init__(self, part: Part, other: Part | Literal["auto"] = "auto") -> None:
        self.part, self.other = part, other


PART, WHOLE = f"{__name__}.Part", f"{__name__}.Whole"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--count=x"], "count: expected int, got x"),
        (["--whole=3"], "whole: no such class: 3; known classes: Whole"),
        (
            [f"--whole={WHOLE}", f"--whole.part={PART}", "--whole.part.size=small"],
            "whole.part.size: expected int, got small",
        ),
        (
            [f"--whole={WHOLE}", f"--whole.part={PART}", "--whole.part.width=3"],
            "whole.part: Option 'width' is not accepted; Part has size, scale",
        ),
        (
            [f"--whole={WHOLE}", f"--whole.other={PART}", "--whole.other.scale=big"],
            "whole.other.scale: expected float, got big",
        ),
    ],
)
def test_of_all_readings_the_one_that_came_furthest_is_said(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = OneLineErrors()
    parser.add_argument("--count", type=int)
    parser.add_subclass_arguments(Whole, "whole")
    for _ in range(2):  # what an earlier run met is not taken for a part of this mistake
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(words)
        assert capsys.readouterr().err.startswith(f"lightning-dsmoe: error: {line}")
