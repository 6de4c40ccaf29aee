"""Prompts of a city must come from the encoder, the template and the precision that the model was trained with."""

from topt_deploy.bundle.manifest import Manifest
from topt_deploy.data.city import City
from topt_deploy.errors import BadData
from topt_deploy.prompts.precision import comparable


def check_prompts(manifest: Manifest, city: City, name: str) -> None:
    """Refuse prompts of another encoder, template or precision than the model was trained with.

    Args:
        manifest: The bundle's.
        city: The city; what its prompts were made with stands in its table's metadata, or is not known.
        name: What errors call the regions table.

    Raises:
        BadData: Naming the column, and both sides.
    """
    for column, facts in manifest.prompts.items():
        for what, found in (("encoder", city.encoders.get(column)), ("template", city.templates.get(column))):
            expected = facts.get(what)
            if expected and found and expected != found:
                raise BadData(
                    f"prompts come from another {what} than the model's", file=name, column=column,
                    expected=expected, found=found, fix=f"encode them with the model's {what}",
                )  # fmt: skip
        trained, given = facts.get("precision"), city.precisions.get(column)
        if not comparable(trained, given):
            raise BadData(
                "prompts in int4 cannot replace prompts in another precision", file=name, column=column,
                expected=trained, found=given, fix="encode them in the precision of the training city's",
            )  # fmt: skip
