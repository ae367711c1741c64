"""Text of a model that is in training, or was loaded from a checkpoint of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from lightning_dsmoe.data import TextDataModule
from lightning_dsmoe.inference import compile_sparse
from lightning_dsmoe.inference import generate as generate_tokens
from lightning_dsmoe.routing import SelectionPlan, TopK
from lightning_dsmoe.training.language_model import DSMoELanguageModel

MakeModel = Callable[..., DSMoELanguageModel]
GREEDY = {"temperature": 0}


@pytest.mark.parametrize("plan", [None, SelectionPlan(TopK(2))])
def test_tokens(plan: SelectionPlan | None, make_model: MakeModel) -> None:
    model = make_model(expert_selection=TopK(1)).train()
    model.decoder.blocks[0].eval()  # as somebody freezes it
    modes = [module.training for module in model.modules()]
    prompts = torch.randint(97, (2, 5))
    found = model.generate(prompts, 6, plan, **GREEDY)
    assert [module.training for module in model.modules()] == modes
    runs = plan or SelectionPlan(TopK(1))
    assert torch.equal(found, generate_tokens(model.decoder.eval(), prompts, 6, runs, **GREEDY))
    sparse = compile_sparse(model, runs)
    sparse.engine.can_compile = False
    assert torch.equal(found, sparse.generate(prompts, 6, **GREEDY))
    assert model.generate([1, 2, 3], 2).shape == (5,)


def test_text_needs_a_tokenizer(make_one_model: MakeModel) -> None:
    model = make_one_model()
    with pytest.raises(ValueError, match=r"without a tokenizer, so it continues tokens"):
        model.generate("def ")
    with pytest.raises(TypeError, match=r"generate has no 'max_tokens'; max_new_tokens="):
        model.generate([1], max_tokens=3)
    with pytest.raises(ValueError, match=r"top_k must be at least 1, got 0"):
        model.generate([1], top_k=0)


@pytest.mark.slow
def test_text_of_the_data_and_of_a_checkpoint(
    make_one_model: MakeModel, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("what the model reads, again and again\n" * 40)
    options: dict[str, Any] = {"cache_dir": str(tmp_path), "batch_size": 2, "val_fraction": 0.3}
    data = TextDataModule(str(text), context=16, **options)
    model = make_one_model(vocab_size=data.vocab_size)
    trainer = make_trainer(max_steps=1, logger=False, limit_val_batches=0)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = DSMoELanguageModel.load_from_checkpoint(tmp_path / "last.ckpt")
    sparse = compile_sparse(tmp_path / "last.ckpt", SelectionPlan())
    sparse.engine.can_compile = False
    for prompts in ("what the ", ["what", "again and"]):
        expected = sparse.generate(prompts, 20, **GREEDY)  # beyond the context
        assert model.generate(prompts, 20, **GREEDY) == expected
        assert loaded.generate(prompts, 20, **GREEDY) == expected
    with pytest.raises(ValueError, match="the prompt has 17 tokens, the context holds 16"):
        loaded.generate("x" * 17)
