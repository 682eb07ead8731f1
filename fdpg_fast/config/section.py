"""What all sections of a config have in common: frozen, no unknown keys, documented by their attributes' docstrings."""

import os.path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _user_path(path: str) -> str:
    expanded, longest = os.path.expanduser(path), max(len(part.encode()) for part in path.split("/"))
    if not path or not path.isprintable() or expanded.startswith("~") or longest > 255:
        raise ValueError("no file can have this name")
    if path.startswith("$") or "${" in path:  # of the environment, or of Hydra, which would become a folder "$HOME"
        raise ValueError("variables are not put in here; write the path out, or let the shell do it: --key=$NAME/…")
    return expanded


Count = Annotated[int, Field(ge=1, le=10**9)]
UserPath = Annotated[str, AfterValidator(_user_path)]  # a file, a folder or whatever begins with one; ~ is expanded


class Section(BaseModel):
    """A group of config keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, data: Any) -> Any:
        for name, value in data.items() if isinstance(data, dict) else ():
            kind = cls.model_fields[name].annotation if name in cls.model_fields else None
            is_switch = kind is bool or "on" in get_args(kind)
            items = value if isinstance(value, list) else [value]
            if not is_switch and any(isinstance(item, bool) for item in items):
                raise ValueError(f"{name} is neither true nor false (YAML's yes and no too); put quotes around a text")
        return data
