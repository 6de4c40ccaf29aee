"""DeepSeek-VL2's published configuration, read and checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import DeepseekV2Config

from topt_deploy.errors import BadData


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The image tower.

    Attributes:
        width, inner: Of its hidden states, and within its MLPs.
        layers, heads: How many.
        patch: Edge of a patch in pixels.
        side: Whole patches in each direction of a tile.
        tile: Edge of a tile in pixels.
        attention: The implementation of transformers to use.
    """

    width: int
    inner: int
    layers: int
    heads: int
    patch: int
    side: int
    tile: int
    attention: str = "sdpa"


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """From patches to token embeddings.

    Attributes:
        ratio: So many patches in each direction make one token.
        inner: Width between its linear layers.
        depth: How many linear layers.
    """

    ratio: int
    inner: int
    depth: int


@dataclass(frozen=True, kw_only=True, eq=False)
class DeepseekVL2Config:
    """A published config.json in the terms of transformers.

    Attributes:
        vision: The image tower.
        projector: Between tower and language model.
        language: The language model, with what transformers' class does not know as attributes of its own:
            ``use_mla``, ``scoring_func``. Without MLA, ``head_dim`` is the width of a head.
    """

    vision: VisionConfig
    projector: ProjectorConfig
    language: DeepseekV2Config

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "DeepseekVL2Config":
        """Read config.json, with the defaults of the published code.

        Raises:
            BadData: If it is another model's, or a variant that none of the three published sizes is.
        """
        try:
            vision, projector, language = (
                dict(config[f"{part}_config"]) for part in ("vision", "projector", "language")
            )
            ratio = projector.get("mlp_ratio", 1)
            width, heads = language["hidden_size"], language["num_attention_heads"]
            language["num_hidden_layers"], language["n_routed_experts"], language["n_shared_experts"]
        except KeyError as error:
            raise BadData(f"{error} is absent", file="config.json", expected="a DeepSeek-VL2 model's") from error
        language = {"use_mla": True, "scoring_func": "softmax", "topk_method": "greedy", **language}
        gate = (language["scoring_func"], language["topk_method"])
        _supported("language_config.scoring_func, topk_method", gate, ("softmax", "greedy"), ("sigmoid", "noaux_tc"))
        _supported("language_config.n_group", language.get("n_group"), None, 1)
        _supported("language_config.moe_layer_freq", language.get("moe_layer_freq", 1), 1)
        _supported(
            "projector_config.projector_type",
            projector.get("projector_type", "downsample_mlp_gelu"),
            "downsample_mlp_gelu",
        )
        _supported("projector_config.token_pooling", projector.get("token_pooling", False), False)
        if not language["use_mla"]:
            head = width // heads  # the unused sizes are null or 0, which transformers' class refuses or divides by
            language |= {"kv_lora_rank": 1, "q_lora_rank": None, "qk_nope_head_dim": 0}
            language |= {"qk_rope_head_dim": head, "v_head_dim": head}
        tower, patch, tile = vision.get("width", 1024), vision.get("patch_size", 16), vision.get("image_size", 384)
        return cls(
            vision=VisionConfig(
                width=tower,
                inner=int(tower * vision.get("mlp_ratio", 4)),
                layers=vision.get("layers", 24),
                heads=vision.get("heads", 16),
                patch=patch,
                side=tile // patch,
                tile=tile,
            ),
            projector=ProjectorConfig(
                ratio=projector.get("downsample_ratio", 2), inner=ratio * width, depth=projector.get("depth", 2)
            ),
            language=DeepseekV2Config(**(language | {"attn_implementation": "sdpa"})),
        )


def _supported(what: str, found: object, *known: object) -> None:
    if found not in known:
        raise BadData(
            f"{what} is not that of a published DeepSeek-VL2",
            file="config.json",
            expected=" or ".join(map(repr, known)),
            found=repr(found),
        )
