"""Sizes that an encoder's engines are made for where none are asked for, by the names of its networks' dimensions."""

from topt_deploy.prompts.encoder_spec import EncoderSpec
from topt_deploy.prompts.families.registry import FAMILIES
from topt_deploy.tensorrt.profile import Profile, ProfileRange

from .causal_decoder import BATCH, PAST, TOKENS
from .families import family_export
from .pieces import Network

DECODER: Profile = {
    BATCH: ProfileRange(min=1, opt=1, max=8),
    TOKENS: ProfileRange(min=1, opt=256, max=2048),
    PAST: ProfileRange(min=0, opt=1024, max=16384),
}
"""Regions at once, tokens read at once, and those read before."""


def default_profile(spec: EncoderSpec) -> dict[str, ProfileRange]:
    """Every dimension of an encoder's networks, with sizes that its own settings of images allow."""
    images = family_export(spec.family).image_profile(spec) if spec.family in FAMILIES else {}
    return {**DECODER, **images}


def of_network(network: Network, profile: Profile) -> dict[str, ProfileRange]:
    """The part of a profile that a network's inputs have."""
    names = {dim for spec in network.inputs.values() for dim in spec.dims if isinstance(dim, str)}
    return {name: sizes for name, sizes in profile.items() if name in names}
