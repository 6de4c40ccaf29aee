"""Vision-language models that have no exported form: transformers' own processor and model, one full pass per task."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from topt_deploy.errors import BadConfig
from topt_deploy.model.training_device import check_device
from topt_deploy.prompts.encoder_spec import EncoderSpec
from topt_deploy.prompts.prompt import Array
from topt_deploy.prompts.tokens import Chat, Tokens

from .checkpoint import PRECISIONS, Checkpoint, from_pretrained


@dataclass(frozen=True, kw_only=True, eq=False)
class OtherEncoder:
    """Whatever AutoModelForImageTextToText loads (:class:`topt_deploy.prompts.encode.Encoder`).

    Attributes:
        processor: transformers' own.
        model: transformers' base model, without a language-model head.
    """

    spec: EncoderSpec
    precision: str
    sha256: str
    tokens: Tokens
    processor: Any
    model: Any
    runtime: str = "torch"

    def prompt(self, text: str, images: Sequence[Array], questions: Sequence[str]) -> Any:
        """The model's input, per task."""
        from PIL import Image

        self.tokens.refuse_control(text, "geo-text")
        for question in questions:
            self.tokens.refuse_control(question, "a task's question")
        chat = Chat(**(self.spec.chat if images else self.spec.imageless or self.spec.chat))
        pictures = [Image.fromarray(image) for image in images]
        return [
            self.processor(
                text=[chat.text(text, len(images), question)],
                images=[pictures] if images else None,
                return_tensors="pt",
                add_special_tokens=False,
            )
            for question in questions
        ]

    @torch.inference_mode()
    def vectors(self, prompts: Sequence[Any]) -> Array:
        """Prompt vectors, float32 (B, T, H)."""
        return np.stack([[self._vector(task) for task in tasks] for tasks in prompts])

    def _vector(self, inputs: Any) -> Array:
        inputs = inputs.to(self.model.device, self.model.dtype)
        hidden = self.model(**inputs, use_cache=False).last_hidden_state[0]
        array: Array = hidden.double().mean(0).float().cpu().numpy()
        return array


def other_encoder(checkpoint: Checkpoint, *, device: str, precision: str) -> OtherEncoder:
    """The model, ready to encode.

    Raises:
        NoDevice: If the device is absent.
        BadConfig: If its processor needs a package that is not installed, or it has no base model.
        BadData: If it cannot be loaded.
    """
    from transformers import AutoModelForImageTextToText

    check_device(device)
    processor = _processor(checkpoint)
    model = getattr(from_pretrained(AutoModelForImageTextToText, checkpoint, PRECISIONS[precision]), "model", None)
    if model is None:
        raise BadConfig(
            f"a {checkpoint.config['model_type']} has no base model that gives hidden states alone",
            file=checkpoint.path,
            expected="a model such as SmolVLM or Qwen3-VL",
        )
    return OtherEncoder(
        spec=checkpoint.spec,
        precision=precision,
        sha256=checkpoint.sha256,
        tokens=Tokens(checkpoint.tokenizer),
        processor=processor,
        model=model.to(device),
    )


def _processor(checkpoint: Checkpoint) -> Any:
    """The model's processor for still images: AutoProcessor would ask for torchvision to read videos with."""
    import transformers
    from transformers import AutoImageProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]

    name = checkpoint.config["model_type"]
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        kind: Any = getattr(transformers, PROCESSOR_MAPPING_NAMES[name])
        still: Any = type(kind.__name__, (kind,), {"check_argument_for_proper_class": _without_videos})
        parts = {
            "image_processor": AutoImageProcessor.from_pretrained(checkpoint.path, backend="pil", **local),
            "tokenizer": AutoTokenizer.from_pretrained(checkpoint.path, **local),
            "video_processor": None,
        }
        settings, _ = kind.get_processor_dict(checkpoint.path, **local)
        return still.from_args_and_dict([parts[part] for part in kind.get_attributes()], settings)
    except (ImportError, KeyError, OSError, TypeError, ValueError) as error:  # all of them said by the library
        raise BadConfig(
            f"transformers cannot build this {name}'s processor here ({' '.join(str(error).split())})",
            file=checkpoint.path,
            expected="a processor of images and text that needs Pillow alone",
            fix="install the package named above, or take a model of another family",
        ) from error


def _without_videos(self: Any, name: str, part: Any) -> Any:
    return None if name == "video_processor" else super(type(self), self).check_argument_for_proper_class(name, part)
