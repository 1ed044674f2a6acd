"""Loading a weak model by its name, and whether its vocabulary is the strong model's."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..distributed.sharding import whole_shape
from ..modeling.adapters import load_adapter_config
from ..modeling.modes import unwrap_adapter
from ..user_warnings import warn


def split_revision(name: str, init_kwargs: dict[str, Any]) -> str:
    """Take the `@revision` of a hub id off and put it into the keyword arguments for loading."""
    if "@" not in name or Path(name).exists():
        return name
    name, revision = name.split("@", 1)
    if init_kwargs.setdefault("revision", revision) != revision:
        raise ValueError(
            f"The weak model {name!r} has the revision {revision!r} in its name and {init_kwargs['revision']!r} in "
            "`weak_model_init_kwargs`. Keep one of them."
        )
    return name


def load_weak_model(name_or_path: str, strong: PreTrainedModel, **init_kwargs: Any) -> PreTrainedModel:
    """
    Load a weak model from a checkpoint folder (of a model, or of an adapter with its base) or the Hub.

    Args:
        name_or_path (`str`):
            Folder or hub id.
        strong ([`~transformers.PreTrainedModel`]):
            The strong model, whose `dtype` and attention implementation are the defaults.
        init_kwargs:
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`].
    """
    model_class = weak_model_class(name_or_path, strong, init_kwargs)
    init_kwargs.setdefault("dtype", strong.dtype)
    init_kwargs.setdefault("attn_implementation", strong.config._attn_implementation)
    # Loading may draw random numbers; phase 1 must not notice
    with torch.random.fork_rng(devices=[]):
        return model_class.from_pretrained(name_or_path, **init_kwargs)


def weak_model_class(name_or_path: str, strong: PreTrainedModel, init_kwargs: dict[str, Any]) -> type:
    """
    The class to load a weak model with. It is the class of the strong model if the checkpoint names that. TRL chooses
    the class of the strong model in the same way. `AutoModelForCausalLM` may take only the text part of a model that
    also sees images.
    """
    adapter = load_adapter_config(name_or_path, init_kwargs)
    if adapter is not None:
        name_or_path = adapter.base_model_name_or_path
    try:
        config = init_kwargs.get("config") or AutoConfig.from_pretrained(name_or_path, **hub_options(init_kwargs))
    except ValueError as error:  # it has no `config.json`, or not that of a model
        raise OSError(str(error)) from error
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if named is None:  # its code comes from the Hub
        return AutoModelForCausalLM
    # Private to transformers, checked with 5.23
    has_text_model = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if has_text_model and not isinstance(unwrap_adapter(strong), named) else named


def hub_options(init_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments that say where on the Hub a model is and who may read it."""
    options = ("revision", "token", "cache_dir", "trust_remote_code")
    return {option: init_kwargs[option] for option in options if option in init_kwargs}


def load_tokenizer(name_or_path: str, init_kwargs: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer stored with a weak model. `None`, with a warning, if there is none. `init_kwargs` are those of the
    model."""
    problem = "there is none"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **hub_options(init_kwargs))
    except (OSError, ValueError, KeyError) as error:
        problem = first_line(error)
    else:
        # Where it finds no files, transformers 5.23 makes a tokenizer without a vocabulary for some architectures
        if len(tokenizer.get_vocab()) > len(tokenizer.added_tokens_decoder):
            return tokenizer
    warn(
        f"The tokenizer of `weak_model={name_or_path!r}` cannot be loaded ({problem}), so only the sizes of the "
        "vocabularies are compared. Save the tokenizer beside the weak model, or make sure that both have the "
        "same.",
        stacklevel=5,
    )
    return None


@contextmanager
def naming_weak_model(name_or_path: str) -> Iterator[None]:
    """If a weak model cannot be found, name the option in the error."""
    try:
        yield
    except (OSError, HFValidationError) as error:
        if Path(name_or_path).exists():
            problem = f"is not the folder of a model or of an adapter ({first_line(error)})"
        else:
            problem = f"is not a folder here, nor can it be had from the Hub ({first_line(error)})"
        raise ValueError(
            f"`weak_model={name_or_path!r}` {problem}. Pass the folder of a checkpoint or a hub id "
            "(`org/name@revision`); what it takes to read it (`token`, `cache_dir`) belongs into "
            "`weak_model_init_kwargs`."
        ) from error


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


def check_same_vocabulary(
    strong: PreTrainedModel,
    weak: PreTrainedModel,
    strong_tokenizer: PreTrainedTokenizerBase | None = None,
    weak_tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """
    Check that logits of both models can be mixed: equal vocabulary sizes and, where both tokenizers are known, no
    token id with two meanings.

    Raises:
        ValueError: If the vocabularies differ.
    """
    strong_size, weak_size = (whole_shape(model.get_output_embeddings().weight)[0] for model in (strong, weak))
    remedy = "Use an earlier checkpoint of the same model, or another model with the same tokenizer."
    if strong_size != weak_size:
        raise ValueError(
            f"`weak_model` has a vocabulary of {weak_size} tokens and the model one of {strong_size}: their logits "
            f"cannot be mixed. {remedy}"
        )
    if strong_tokenizer is None or weak_tokenizer is None:
        return
    strong_tokens, weak_tokens = (
        {index: token for token, index in tokenizer.get_vocab().items()}
        for tokenizer in (strong_tokenizer, weak_tokenizer)
    )
    clashes = [i for i in sorted(strong_tokens.keys() & weak_tokens.keys()) if strong_tokens[i] != weak_tokens[i]]
    if clashes:
        first = clashes[0]
        raise ValueError(
            f"`weak_model` has another tokenizer: {len(clashes)} token ids mean something else, for example id "
            f"{first} is {weak_tokens[first]!r} there and {strong_tokens[first]!r} in the model. {remedy}"
        )
