"""What the processes of torchrun have of a model that they load by parts."""

from __future__ import annotations

import contextlib
from typing import Any


def save_weights(folder: str, dtype: str, way: str, path: str) -> None:
    """Of a model that is loaded by parts and divided, by name and whole; or why it is refused, as each process says it.

    way: "read" where each process is to read its part of every tensor, "in turn" where it must not, "any" else.
    """
    from unittest import mock

    import torch

    from fdpg_fast import ranks
    from fdpg_fast.errors import UserError
    from fdpg_fast.models import parallel, parts
    from fdpg_fast.models.load import load_model

    ranks.join("cpu")
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as patches:
        if way == "read":
            patches.enter_context(mock.patch.object(parts, "_in_turn", side_effect=AssertionError("read whole")))
        if way == "in turn":
            patches.enter_context(mock.patch.object(parts, "_keeps_rows", lambda model: False))
        try:
            model = load_model(folder, dtype, "cpu", trust_remote_code=False, is_divided=True)
        except UserError as error:
            said = str(error)
        else:
            model.divide(None)
            tensors = [*model.model.named_parameters(), *model.model.named_buffers()]
            found = {name: parallel.full(x.detach()) for name, x in tensors}
            found["numbers held"] = sum(x.to_local().numel() for x in set(model.model.parameters()))
            said = ""
    said_by_all, held = ranks.gathered(said), ranks.gathered(found.pop("numbers held", 0))
    if ranks.is_first():
        torch.save({"refused": said_by_all, "held": held, "tensors": found}, path)
