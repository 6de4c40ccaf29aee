"""Published checkpoints, from a folder or the hub's cache: safetensors only, none of their code, offline by default."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from topt_deploy.errors import BadConfig, BadData, NoInput, UsageError
from topt_deploy.prompts.cache import content_key
from topt_deploy.prompts.encoder_spec import EncoderSpec
from topt_deploy.prompts.families.registry import FAMILIES, TEXT, ModelFamily, host_module
from topt_deploy.storage.hashed_file import sha256_bytes, sha256_file
from topt_deploy.storage.os_errors import reading

from .chat_frames import chat_frames

OTHER = "other"
"""Models that run in PyTorch alone (:mod:`.transformers_encoder`), and are not exported."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_OTHER = ModelFamily(model_type=None, images=True, imageless_frame=True)
_TYPES = {family.model_type: name for name, family in FAMILIES.items() if family.model_type is not None}
_WANTED = ("*.safetensors", "*.json", "*.jinja")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A model's files.

    Attributes:
        path: Their folder.
        config: Of config.json.
        preprocessor: The image settings in the files; empty where the model reads none.
        tokenizer: The bytes of tokenizer.json.
        weights: The safetensors files.
        spec: The model's description as an encoder.
    """

    path: Path
    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any]
    tokenizer: bytes
    weights: tuple[Path, ...]
    spec: EncoderSpec

    @cached_property
    def sha256(self) -> str:
        """Of what its vectors depend on besides weights and ``spec``."""
        return content_key(config=dict(self.config), tokenizer=sha256_bytes(self.tokenizer))


def quiet() -> None:
    """Keep transformers' advice on packages, and its bars for files, from the user."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def open_checkpoint(model: str, *, allow_download: bool = False, revision: str | None = None) -> Checkpoint:
    """Find a model and read everything of it but the weights, which are hashed.

    Args:
        model: A folder, or an id of the Hugging Face hub, such as ``Qwen/Qwen2.5-VL-7B-Instruct``.
        allow_download: Fetch what the hub's cache lacks.
        revision: The commit of a hub's model; with ``allow_download`` it must be given.

    Raises:
        NoInput: If the model is not on this machine, or lacks a file.
        BadData, BadConfig: If a file is broken, or the model none that can be encoded with.
        UsageError: If the commit is missing or is a name that may move.
    """
    path = _locate(model, allow_download, revision)
    config = read_config(path)
    if "quantization_config" in config:
        raise BadConfig(
            "the weights are already quantized",
            file=path / "config.json",
            expected="the model's own weights: exporting quantizes them",
            found=f"quant_method {config['quantization_config'].get('quant_method')!r}",
            fix="take the model that this one was made from",
        )
    family, width = _family(config, path)
    tokenizer = read_tokenizer(path)
    weights = _weights(path)
    facts = FAMILIES.get(family, _OTHER)
    host = host_module(family) if family in FAMILIES else None
    preprocessor = _preprocessor(path) if facts.images else {}
    settings = dict(preprocessor)
    if host is not None and host.SETTINGS is not None:
        try:
            settings = asdict(host.SETTINGS.from_config(config, preprocessor))
        except KeyError as error:
            raise BadConfig(
                f"{error} is absent",
                file=path,
                expected=f"config.json and preprocessor_config.json of a {family} model",
            ) from error
    own = None if host is None else host.CHAT
    chat, imageless = (own, own) if own is not None else chat_frames(path, images=facts.images)
    if facts.imageless_frame is False and (chat.before, chat.after) != (imageless.before, imageless.after):
        raise BadConfig("the chat template has another frame without images", file=path, expected="the published one")
    spec = EncoderSpec(
        family=family,
        name=model if not Path(model).is_dir() else path.resolve().name,
        weights_sha256=content_key(files=sorted((file.name, sha256_file(file)) for file in weights)),
        width=width,
        settings=settings if facts.images else {},
        chat=asdict(chat),
        imageless=asdict(imageless) if facts.imageless_frame else None,
        context=tokens_made_for(config),
    )
    return Checkpoint(
        path=path, config=config, preprocessor=preprocessor, tokenizer=tokenizer, weights=tuple(weights), spec=spec
    )


def read_config(folder: Path) -> dict[str, Any]:
    """A model's config.json.

    Raises:
        NoInput: If there is none.
        BadData: If it is broken.
    """
    config = _json(folder / "config.json")
    if config is None:
        raise NoInput(
            "no model in this folder", file=folder / "config.json", fix="name the folder that holds config.json"
        )
    return config


def read_tokenizer(folder: Path) -> bytes:
    """A model's tokenizer.json.

    Raises:
        NoInput: If there is none.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        raise NoInput(
            "the model has no tokenizer.json",
            file=file,
            fix=f'python -c "from transformers import AutoTokenizer as A; A.from_pretrained({str(folder)!r})'
            f'.save_pretrained({str(folder)!r})" writes it',
        )
    with reading(file):
        return file.read_bytes()


def tokens_made_for(config: Mapping[str, Any]) -> int | None:
    """Tokens that a language model was made for, as its configuration says; None where it does not."""
    inner = (config.get(name) for name in ("text_config", "language_config"))
    parts = [part for part in (*inner, config) if isinstance(part, Mapping)]
    found = (part.get("max_position_embeddings") for part in parts)
    return next((tokens for tokens in found if type(tokens) is int and tokens > 0), None)


def from_pretrained(kind: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """A model of transformers with every one of its weights out of the files.

    Raises:
        BadData: If it cannot be read, or a weight is absent: transformers would draw it at random.
    """
    try:
        model, found = kind.from_pretrained(
            checkpoint.path,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (
        ImportError,
        KeyError,
        OSError,
        RuntimeError,
        SafetensorError,
        ValueError,
    ) as error:  # all of them said by the library
        raise BadData(
            f"the model cannot be loaded ({error})", file=checkpoint.path, fix="fetch it again, or take another"
        ) from error
    absent = sorted({*found["missing_keys"], *(str(key[0]) for key in found["mismatched_keys"])})
    if absent:
        raise BadData(
            "weights that the model needs are absent or of another shape",
            file=checkpoint.path,
            expected=f"a whole {checkpoint.config['model_type']}",
            found=f"{len(absent)} missing, such as {absent[0]}",
            fix="fetch the model again, all its files from one revision",
        )
    return model.requires_grad_(False).eval()


def _locate(model: str, allow_download: bool, revision: str | None) -> Path:
    folder = Path(model)
    if folder.is_dir():
        if allow_download or revision:
            raise UsageError("a folder has no revision and is not downloaded", file=folder)
        return folder
    if allow_download and not (revision and _COMMIT.fullmatch(revision)):
        raise UsageError(
            "--allow-download needs --revision with a commit",
            expected="40 hexadecimal digits: a branch or a tag may be another model tomorrow",
            found=revision or "none",
            fix=f"take the commit from https://huggingface.co/{model}/commits/main",
        )
    if not _ID.fullmatch(model):
        raise NoInput(
            "no such folder", file=model, expected="a model's folder, or an id such as 'Qwen/Qwen2.5-VL-7B-Instruct'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                local_files_only=not allow_download,
                allow_patterns=list(_WANTED),
                ignore_patterns=["*/*"],
            )
        )
    except Exception as error:  # of the hub, of HTTP, of the disk
        if allow_download:
            raise NoInput(
                f"the model cannot be downloaded ({error})", file=model, fix="check id, commit, access and network"
            ) from error
        raise NoInput(
            "the model is not on this machine",
            file=model,
            expected=f"in the hub's cache {HF_HUB_CACHE!r}" + (f", commit {revision}" if revision else ""),
            fix="add --allow-download --revision COMMIT (and later --revision COMMIT alone), or elsewhere"
            f" `hf download {model} --revision COMMIT --local-dir DIR`, copy DIR here and give it as --model",
        ) from error


def _json(file: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file."""
    if not file.exists():
        return None
    try:
        with reading(file):
            values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadData(f"not JSON ({error})", file=file, fix="fetch the model again") from error
    if not isinstance(values, dict):
        raise BadData("not a JSON object", file=file, fix="fetch the model again")
    return values


def _preprocessor(folder: Path) -> dict[str, Any]:
    """The image settings: in their own file, in the processor's file under ``image_processor``, or directly in it."""
    merged: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        values = _json(folder / name) or {}
        merged |= values.get("image_processor", values)
    if not merged:
        raise NoInput(
            "the image settings are missing", file=folder, expected="preprocessor_config.json",
            fix="fetch the whole model",
        )  # fmt: skip
    return merged


def _weights(folder: Path) -> list[Path]:
    index = _json(folder / "model.safetensors.index.json")
    files = sorted(folder.glob("*.safetensors"))
    if index is not None:
        files = sorted({folder / name for name in index["weight_map"].values()})
    absent = [file.name for file in files if not file.exists()]
    if absent:
        raise NoInput(
            "weights are missing", file=folder / absent[0], found=f"{len(absent)} of {len(files)} files absent"
        )
    if files:
        return files
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise BadData(
            "the weights are pickles, which run code when they are opened",
            file=folder / pickles[0],
            expected="*.safetensors",
            fix="where you trust them, load the model with transformers and call model.save_pretrained(FOLDER)",
        )
    raise NoInput("no weights", file=folder, expected="*.safetensors", fix="fetch the whole model")


def _family(config: Mapping[str, Any], path: Path) -> tuple[str, int]:
    """The family, and the width of its hidden states."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    kind = config.get("model_type")
    family = _TYPES.get(kind or "")
    if family is None and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        family = OTHER
    if family is None and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        family = TEXT
    if family is None:
        raise BadConfig(
            "this model cannot encode prompts"
            + ("; code in a model's folder is never run" if "auto_map" in config else ""),
            file=path / "config.json",
            expected=f"a model_type of {', '.join(_TYPES)}, or one that transformers reads text or images with",
            found=repr(kind),
        )
    if family in FAMILIES and (keys := FAMILIES[family].hidden_size) is not None:
        width: Any = config
        for key in keys:
            width = width[key]
        return family, int(width)
    try:
        text = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False).get_text_config()
        width = int(text.hidden_size)
    except Exception as error:  # each model checks its own configuration in its own way
        raise BadConfig(f"transformers does not take it ({error})", file=path / "config.json") from error
    layers, window = getattr(text, "layer_types", None), getattr(text, "sliding_window", None)
    narrow = set(layers) - {"full_attention"} if layers else {f"sliding_window {window}"} if window else None
    if narrow and family != OTHER:
        raise BadConfig(
            "not every layer attends to all that came before: such models are not supported",
            file=path / "config.json",
            expected="no sliding window, and no other kind of layer",
            found=", ".join(sorted(narrow)),
            fix="take another model",
        )
    return family, width
