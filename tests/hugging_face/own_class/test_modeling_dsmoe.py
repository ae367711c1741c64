"""The own class computes what the decoder computes under its plan."""

import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import SequentialSampler

from lightning_dsmoe import AllExperts, MixtureOfExperts, SelectionPlan, Threshold, TopK
from lightning_dsmoe.routing import Selection, ThresholdTopK, TopP
from tests.hugging_face.own_class.conftest import (
    VOCABULARY,
    Case,
    assert_close,
    exported,
    gpt,
    mixtures,
    olmoe,
    pruned,
)

CACHES = ("cache", "past_key_values")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_logits(case: Case, text: Tensor, tmp_path: Path, attention: str) -> None:
    model = exported(case, tmp_path, attn_implementation=attention)
    for tokens in (text, text[:1, :5]):  # sorted by expert, and few tokens
        assert_close(model(tokens).logits, case.decoder(tokens, case.plan).logits)


@pytest.mark.parametrize(
    "selection",
    [
        AllExperts(),
        AllExperts(renormalize=True),
        TopK(1),
        TopP(0.99, renormalize=True),
        TopP(1.0),
        Threshold(0.0),
        ThresholdTopK(0.5, renormalize=True),
    ],
    ids=str,
)
@torch.no_grad()
def test_where_experts_are_gone(selection: Selection, text: Tensor, tmp_path: Path) -> None:
    case = pruned()._replace(plan=SelectionPlan(experts=selection, attention=selection))
    model = exported(case, tmp_path)
    for tokens in (text, text[:1, :5]):
        assert_close(model(tokens).logits, case.decoder(tokens, case.plan).logits)


@torch.no_grad()
def test_the_plan_matters(text: Tensor, tmp_path: Path) -> None:
    case = mixtures()
    dense = case.decoder(text).logits
    sparse = exported(case, tmp_path)(text).logits
    assert (sparse - dense).abs().max() > 1e-2 * dense.abs().max()


@torch.no_grad()
def test_greedy_text(case: Case, tmp_path: Path) -> None:
    model = exported(case, tmp_path)
    expected = prompt = torch.randint(VOCABULARY, (1, 7))
    by_batch = any(isinstance(s, ThresholdTopK) for s in (case.plan.experts, case.plan.attention))
    caches = case.decoder.new_caches(1, 80)
    read = prompt
    for _ in range(64):
        logits = case.decoder(read, case.plan, caches=caches).logits
        read = logits[:, -1:].argmax(-1)
        expected = torch.cat([expected, read], dim=1)
    whole = model.generate(prompt, max_new_tokens=64, do_sample=False)
    assert whole.tolist() == expected.tolist()
    others: list[dict[str, Any]] = [{"cache_implementation": "static"}]
    if not by_batch:  # what runs for a token depends on the others that are read at once
        others.append({"use_cache": False})
    for options in others:
        start = model.generate(prompt, max_new_tokens=12, do_sample=False, **options)
        assert start.tolist() == expected[:, :19].tolist()


@pytest.mark.parametrize("name", CACHES)
@torch.no_grad()
def test_cache_under_both_names(text: Tensor, tmp_path: Path, name: str) -> None:
    from transformers import DynamicCache

    model = exported(mixtures(), tmp_path)
    whole = model(text).logits
    cache = DynamicCache(config=model.config)
    parts = [model(text[:, at], **{name: cache}).logits for at in (slice(9), slice(9, None))]
    assert cache.get_seq_length() == text.shape[1]
    assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [mixtures, gpt, olmoe])
@torch.no_grad()
def test_padding(text: Tensor, tmp_path: Path, make: Any, side: str) -> None:
    model = exported(make(), tmp_path)
    n_padded = 6
    real = slice(n_padded, None) if side == "left" else slice(None, -n_padded)
    mask = torch.ones_like(text)
    mask[0] = 0
    mask[0, real] = 1
    padded = model(text, attention_mask=mask).logits
    assert padded.isfinite().all()
    assert_close(padded[:1, real], model(text[:1, real]).logits)
    assert_close(padded[1:], model(text[1:]).logits)


@pytest.mark.parametrize("make", [mixtures, gpt, olmoe])
@torch.no_grad()
def test_batched_generation_is_that_of_each_text(text: Tensor, tmp_path: Path, make: Any) -> None:
    model = exported(make(), tmp_path)
    mask = torch.ones_like(text)
    mask[0, :6] = 0
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    together = model.generate(text, attention_mask=mask, **options)[:, text.shape[1] :]
    first = model.generate(text[:1, 6:], **options)[:, -16:]
    second = model.generate(text[1:], **options)[:, -16:]
    assert together.tolist() == [*first.tolist(), *second.tolist()]


@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 3, "do_sample": False}])
def test_sampling_and_beams(tmp_path: Path, text: Tensor, options: dict[str, Any]) -> None:
    model = exported(mixtures(), tmp_path)
    out = model.generate(text, max_new_tokens=8, **options)
    assert out.shape == (2, text.shape[1] + 8)
    torch.manual_seed(3)
    cached = model.generate(text, max_new_tokens=8, **options)
    torch.manual_seed(3)
    assert cached.tolist() == (
        model.generate(text, max_new_tokens=8, use_cache=False, **options).tolist()
    )


def test_training_step(case: Case, text: Tensor, tmp_path: Path) -> None:
    dense = Case(case.decoder, SelectionPlan())
    model = exported(dense, tmp_path).train()
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # the newer one
    next(getattr(model, name) for name in names if hasattr(model, name))()
    loss = model(text, labels=text).loss
    loss.backward()
    logits = dense.decoder(text).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected)
    theirs = model.model.layers[1]
    ours: Any = dense.decoder.blocks[1]
    pairs = [
        (theirs.attention.w_q, ours.attention.heads.w_q.weight),
        (theirs.attention.w_o, ours.attention.heads.w_o.weight),
        (theirs.feed_forward.experts.w_in, ours.feed_forward.experts.w_in.weight),
        (model.model.embed_tokens.weight, dense.decoder.embedding.weight),
    ]
    if isinstance(ours.feed_forward, MixtureOfExperts):
        parameters = zip(
            theirs.feed_forward.mixture.router.parameters(),
            ours.feed_forward.router.parameters(),
            strict=True,
        )
        pairs += list(parameters)
    for given, wanted in pairs:
        assert given.grad.abs().max() > 0
        torch.testing.assert_close(given.grad, wanted.grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_hidden_states_attentions_and_tuples(text: Tensor, tmp_path: Path) -> None:
    case = mixtures()
    model = exported(case, tmp_path, attn_implementation="eager")
    out = model(text, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 4
    assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    torch.testing.assert_close(out.hidden_states[0], case.decoder.embed(text))
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 6, 23))
    assert torch.equal(model(text, return_dict=False)[0], out.logits)
    assert_close(model(text, logits_to_keep=1).logits, out.logits[:, -1:])
    embeds = model.get_input_embeddings()(text)
    assert_close(model(inputs_embeds=embeds).logits, out.logits)


@torch.no_grad()
def test_saved_again(case: Case, text: Tensor, tmp_path: Path) -> None:
    model = exported(case, tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    again, info = type(model).from_pretrained(tmp_path / "second", output_loading_info=True)
    assert not any(info.values()), info
    theirs = model.state_dict()
    assert all(torch.equal(each, theirs[name]) for name, each in again.state_dict().items())
    assert_close(again(text).logits, model(text).logits)
    tied = again.lm_head.weight is again.model.embed_tokens.weight
    assert tied == case.decoder.tie_embeddings


@torch.no_grad()
def test_half_precision(text: Tensor, tmp_path: Path) -> None:
    case = mixtures()
    case.decoder.to(torch.bfloat16)
    dense = Case(case.decoder, SelectionPlan(AllExperts()))
    model = exported(dense, tmp_path)
    assert model.dtype == torch.bfloat16
    given, expected = model(text).logits.float(), dense.decoder(text).logits.float()
    assert (given - expected).abs().mean() <= 0.02 * expected.abs().max()


def test_new_weights(tmp_path: Path) -> None:
    model = exported(gpt(), tmp_path)
    fresh = type(model)(model.config)
    assert all(parameter.isfinite().all() for parameter in fresh.parameters())
    assert fresh.model.layers[0].feed_forward.experts.w_in.std().item() == pytest.approx(
        0.02, rel=0.2
    )


def test_new_weights_in_empty_memory(tmp_path: Path) -> None:
    model = exported(olmoe(), tmp_path)
    with torch.device("meta"):
        fresh = type(model)(model.config)
    fresh.to_empty(device="cpu")
    for parameter in fresh.parameters():
        parameter.data.fill_(torch.nan)
    fresh.init_weights()
    assert all(parameter.isfinite().all() for parameter in fresh.parameters())
    assert fresh.model.layers[0].attention.q_norm.weight.unique().tolist() == [1.0]


@pytest.mark.parametrize(
    "options", [{"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "device_map": "cpu"}]
)
@torch.no_grad()
def test_loaded_in_half_precision(text: Tensor, tmp_path: Path, options: dict[str, Any]) -> None:
    case = mixtures()
    model = exported(Case(case.decoder, SelectionPlan()), tmp_path, **options)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    expected = case.decoder.to(torch.bfloat16)(text).logits.float()
    assert (model(text).logits.float() - expected).abs().mean() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_autocast(text: Tensor, tmp_path: Path, attention: str) -> None:
    model = exported(Case(mixtures().decoder, SelectionPlan()), tmp_path)
    model.set_attn_implementation(attention)
    expected = model(text).logits.detach()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(text, labels=text)
        model.generate(text[:, :5], max_new_tokens=3, do_sample=False)
    out.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert out.logits.dtype == torch.bfloat16
    assert (out.logits.float() - expected).abs().mean() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize("make", [mixtures, gpt])
@torch.no_grad()
def test_more_tokens(text: Tensor, tmp_path: Path, make: Any) -> None:
    model = exported(make(), tmp_path / "first")
    before = model(text).logits
    model.resize_token_embeddings(VOCABULARY + 7, mean_resizing=False)
    after = model(text).logits
    assert_close(after[..., :VOCABULARY], before)
    model.save_pretrained(tmp_path / "second")
    again = type(model).from_pretrained(tmp_path / "second")
    assert again.config.vocab_size == VOCABULARY + 7
    assert_close(again(text).logits, after)


@torch.no_grad()
def test_hidden_states_that_no_one_wants_are_freed(text: Tensor, tmp_path: Path) -> None:
    model = exported(mixtures(), tmp_path)
    outputs: list[Any] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *args: outputs.append(weakref.ref(args[-1][0])))
    alive: list[bool] = []
    model.model.norm.register_forward_pre_hook(
        lambda *args: alive.extend(each() is not None for each in outputs)
    )
    model(text)
    assert alive == [False, False, True]


def test_trainer(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(rows)

    model = exported(mixtures(), tmp_path / "first")
    texts = torch.randint(VOCABULARY, (8, 12))
    labels = texts.clone()
    for row, masked in enumerate((0, 3, 9, 0, 6, 1, 2, 0)):
        labels[row, :masked] = -100
    rows = [{"input_ids": i, "labels": j} for i, j in zip(texts, labels, strict=True)]
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = InOrder(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    model.train()
    with torch.no_grad():  # the mean over all labels of the four texts of the first step
        logits = model(texts[:4]).logits[:, :-1].flatten(0, 1)
    expected = cross_entropy(logits, labels[:4, 1:].flatten())
    before = model.model.layers[0].feed_forward.experts.w_in.detach().clone()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-3)
    assert not torch.equal(model.model.layers[0].feed_forward.experts.w_in, before)
    assert trainer.predict(rows).predictions.shape == (8, 12, VOCABULARY)  # and no caches
    trainer.save_model(str(tmp_path / "second"))
    again = type(model).from_pretrained(tmp_path / "second")
    assert_close(again(texts).logits, model.eval()(texts).logits)


def test_wrong_inputs(tmp_path: Path) -> None:
    model = exported(gpt(), tmp_path)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    run = partial(model, torch.zeros(1, 91, dtype=torch.long))
    with pytest.raises(IndexError):
        run()
