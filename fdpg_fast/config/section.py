"""What all sections of a config have in common: frozen, no unknown keys, documented by their attributes' docstrings."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of config keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )
