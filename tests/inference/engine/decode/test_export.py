"""The decode step as a file that PyTorch runs by itself."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_dsmoe import SelectionPlan, Threshold, TopK, compile_sparse
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.engine.cache import DecoderCache
from lightning_dsmoe.inference.engine.decode.compiled_step import CannotCompile
from lightning_dsmoe.inference.engine.decode.export import WholeStep
from lightning_dsmoe.routing import routed_layers

from ..conftest import assert_near, packed, rotary_mlp, token_by_token, unlike_layers

pytestmark = pytest.mark.slow

PLAN = SelectionPlan.of_blocks((TopK(2), Threshold(0.9)), (TopK(1), Threshold(0.8)))
RUN = """
import sys
for name in ("lightning", "lightning_dsmoe", "bitsandbytes"):
    sys.modules[name] = None
import torch
from pathlib import Path
folder = Path(sys.argv[1])
tokens = torch.load(folder / "tokens.pt")
step = torch._inductor.aoti_load_package(str(folder / "step.pt2"))
keys = [torch.zeros(20, 2, 2, 8) for _ in range(2)]
values = [torch.zeros(20, 2, 2, 8) for _ in range(2)]
seen = torch.zeros(20, 2, dtype=torch.bool)
logits = []
for at, tokens_B in enumerate(tokens.T.contiguous()):
    logits.append(step(tokens_B, keys, values, seen, torch.tensor([at])))
assert seen.sum(0).tolist() == [14, 14]
torch.save(torch.stack(logits, 1), folder / "logits.pt")
"""


@torch.no_grad()
def test_the_whole_step_is_the_decoder(decoder: Decoder, tokens: Tensor) -> None:
    twin = packed(decoder)
    cache = DecoderCache(twin, *tokens.shape)
    plan = PLAN if routed_layers(decoder) else SelectionPlan()
    step = WholeStep(twin, plan)
    slots = cache.next_slots()
    seen_SB = torch.zeros_like(slots.seen_SB)
    found = [
        step(tokens_B, slots.keys, slots.values, seen_SB, torch.tensor([at]))
        for at, tokens_B in enumerate(tokens.T)
    ]
    assert_near(torch.stack(found, 1), token_by_token(decoder, plan, tokens, 0))


@torch.no_grad()
def test_the_whole_step_of_layers_that_differ(tokens: Tensor) -> None:
    decoder, plan = unlike_layers(), SelectionPlan(TopK(2), TopK(1))
    twin = packed(decoder)
    step, slots = WholeStep(twin, plan), DecoderCache(twin, *tokens.shape).next_slots()
    seen_SB = torch.zeros_like(slots.seen_SB)
    found = [
        step(tokens_B, slots.keys, slots.values, seen_SB, torch.tensor([at]))
        for at, tokens_B in enumerate(tokens.T)
    ]
    assert_near(torch.stack(found, 1), token_by_token(decoder, plan, tokens, 0))


@pytest.mark.slow
def test_another_process_needs_pytorch_alone(tokens: Tensor, tmp_path: Path) -> None:
    decoder, tokens = rotary_mlp(), tokens[:2]
    compile_sparse(decoder, PLAN).export_step(tmp_path / "step.pt2", n_sequences=2)
    torch.save(tokens, tmp_path / "tokens.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"step.pt2", "tokens.pt"}
    subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], check=True)
    assert_near(torch.load(tmp_path / "logits.pt"), token_by_token(decoder, PLAN, tokens, 0))


def test_what_cannot_be_compiled_leaves_no_file(
    tmp_path: Path, one_decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*args: object, **options: object) -> None:
        raise RuntimeError("no C++ compiler\nwas found")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", no_compiler)
    model = compile_sparse(one_decoder, PLAN)
    with pytest.raises(CannotCompile, match=r"^no C\+\+ compiler was found$"):
        model.export_step(tmp_path / "step.pt2")
    assert list(tmp_path.iterdir()) == []
