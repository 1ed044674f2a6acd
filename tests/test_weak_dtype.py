"""The precision of a frozen weak model, beside models that are loaded in it without the package."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from wmss_trl import WMSSTrainer
from wmss_trl.data.tiny import build_model
from wmss_trl.weak_model.factory import cast_parameters


@pytest.fixture
def base(make_model, tokenizer, tmp_path):
    model = make_model(seed=3, dropout=0.0)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)  # or its outputs hardly depend on its inputs
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def make_trainer(make_args, dataset, tokenizer):
    def make(model, peft_config=None, weak_model=None, **kwargs):
        options = {"sft_epochs": 0, "num_train_epochs": 1, "learning_rate": 1e-2, "active_fraction": 1.0, **kwargs}
        return WMSSTrainer(
            model,
            make_args(**options),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
            weak_model=weak_model,
        )

    return make


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits(model, batch):
    """Of hidden states in the model's precision, in float64."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return model.model(**inputs).last_hidden_state.double() @ model.lm_head.weight.double().t()


def batch_of(trainer, size=4):
    collator = DataCollatorForLanguageModeling(trainer.processing_class.pad_token_id)
    examples = [{key: trainer.train_dataset[i][key] for key in ("input_ids", "labels")} for i in range(size)]
    return collator(examples)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("source", ["copy", "folder"])
def test_loss_is_that_of_an_independently_loaded_model(make_trainer, make_model, base, source, dtype):
    strong = load(base) if source == "copy" else make_model(seed=1, dropout=0.0)
    trainer = make_trainer(strong, weak_model=None if source == "copy" else base, weak_dtype=dtype, mixing_lambda=0.4)
    weak, expected = trainer.weak_reference.model, load(base, getattr(torch, dtype))
    assert {name: p.dtype for name, p in weak.named_parameters()} == {
        name: p.dtype for name, p in expected.named_parameters()
    }
    assert all(torch.equal(p, q) for p, q in zip(weak.parameters(), expected.parameters(), strict=True))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}

    batch = batch_of(trainer)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch)).item()
    with torch.no_grad():
        strong_logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    for model, same in ((expected, True), (load(base), False)):
        mixed = 0.4 * strong_logits + 0.6 * logits(model, batch)
        reference = F.cross_entropy(mixed[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).item()
        assert (abs(loss - reference) < 2e-6 * reference) == same


def entropies(model, trainer):
    values = []
    for example in trainer.train_dataset:
        ids, labels = (torch.tensor([example[key]]) for key in ("input_ids", "labels"))
        z = logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0, :-1]
        log_probs = z[labels[0, 1:] != -100].log_softmax(-1)
        values.append(-(log_probs.exp() * log_probs).sum(-1).mean())
    return torch.stack(values).numpy()


def test_scores_are_those_of_the_rounded_model(make_trainer, base):
    """Of M0, which the strong model still is when it is scored, and of each round."""
    trainer = make_trainer(
        load(base), weak_dtype="bfloat16", weak_refresh="epoch", num_train_epochs=2, save_strategy="epoch"
    )
    found = []
    trainer.curriculum_sampler.on_redraw = lambda metrics: found.append(trainer.curriculum_sampler.weak_entropy)
    trainer.train()
    expected = entropies(load(base, torch.bfloat16), trainer)
    unrounded = entropies(load(base), trainer)
    assert len(found) == 2  # the second round's weak model is the strong one of the start of the first: M0 again
    for entropy in found:
        assert abs(entropy - expected).max() < 2e-2  # products of its LM head are in bfloat16
        assert abs(entropy - unrounded).max() > 1e-4
    assert {p.dtype for p in trainer.weak_reference.model.parameters()} == {torch.bfloat16}


def test_whole_copy_of_a_model_with_an_adapter_that_trains_biases(make_trainer, base):
    model = get_peft_model(load(base), LoraConfig(r=2, bias="all", target_modules="all-linear"))
    trainer = make_trainer(model, weak_dtype="bfloat16")
    assert {p.dtype for p in trainer.weak_reference.model.parameters()} == {torch.bfloat16}
    trainer.train()
    # And one that is put on a model by its name
    trainer = make_trainer(base, LoraConfig(r=2, bias="all", target_modules="all-linear"), weak_dtype="bfloat16")
    assert {p.dtype for p in trainer.weak_reference.model.parameters()} == {torch.bfloat16}


def test_auto_is_the_precision_of_the_checkpoint(make_trainer, base, tmp_path, tokenizer):
    load(base, torch.bfloat16).save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    for option, dtype in (("auto", torch.bfloat16), (None, torch.float32), ("float32", torch.float32)):
        trainer = make_trainer(load(base), weak_model=str(tmp_path / "half"), weak_dtype=option)
        assert trainer.weak_reference.model.dtype == dtype
    assert make_trainer(load(base), weak_dtype="auto").weak_reference.model.dtype == torch.float32


def test_a_copy_keeps_what_loading_keeps(make_model):
    model = make_model()
    model._keep_in_fp32_modules_strict = {"layers.0.self_attn.q_proj"}
    cast_parameters(model, torch.bfloat16)
    assert {name for name, p in model.named_parameters() if p.dtype == torch.float32} == {
        "model.layers.0.self_attn.q_proj.weight"
    }
    assert {buffer.dtype for buffer in model.buffers() if buffer.is_floating_point()} == {torch.float32}


LORA = LoraConfig(r=2)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("adapter off", "the weak model is on the base of `model`.* remove `weak_dtype`"),
        ("second adapter", "the weak model is on the base of `model`.* remove `weak_dtype`"),
        ("earlier adapter", "the weak model is on the base of `model`.* Merge the adapter"),
        ("not mixed", "is `model` before its first step.* remove `weak_dtype`"),
        ("object", "handed in as an object. Load it in this precision"),
        ("quantised", "quantised. Pass a `weak_model` that is not"),
        ("trained", "`train_weak=True`. Remove one of them"),
    ],
)
def test_where_it_cannot_apply_it_is_refused(make_trainer, make_model, tokenizer, base, tmp_path, form, message):
    options, model = {"weak_dtype": "bfloat16"}, load(base)
    if form in ("adapter off", "earlier adapter"):
        options["peft_config"] = LORA
    if form == "earlier adapter":
        get_peft_model(load(base), LORA).save_pretrained(tmp_path / "adapter")
        options["weak_model"] = str(tmp_path / "adapter")
    elif form == "second adapter":
        model = get_peft_model(model, LORA)
    elif form == "not mixed":
        options["mixing_lambda"] = 1.0
    elif form == "object":
        options["weak_model"] = make_model(seed=1)
    elif form == "trained":
        options |= {"train_weak": True, "sft_epochs": 1}
    elif form == "quantised":
        build_model(tokenizer, hidden_size=64, intermediate_size=64, num_layers=1, seed=0).save_pretrained(
            tmp_path / "wide"
        )
        config = BitsAndBytesConfig(load_in_4bit=True)
        AutoModelForCausalLM.from_pretrained(tmp_path / "wide", quantization_config=config).save_pretrained(
            tmp_path / "4-bit"
        )
        tokenizer.save_pretrained(tmp_path / "4-bit")
        options["weak_model"] = str(tmp_path / "4-bit")
    with pytest.raises(ValueError, match=f"`weak_dtype='bfloat16'`.*{message}"):
        make_trainer(model, **options)
