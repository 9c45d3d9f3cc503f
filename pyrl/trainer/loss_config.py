"""The `[loss]` table of a recipe: a preset and any field of LossSpec."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from typing import TYPE_CHECKING, Any, Union, get_type_hints

import pydantic
from pydantic import Field

from pyrl.ops.spec import PRESETS, LossSpec


class Section(pydantic.BaseModel):
    """One table of a recipe; an unknown key is an error."""

    model_config = pydantic.ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        protected_namespaces=(),
    )


class _LossBase(Section):
    """The loss: a preset and any field of LossSpec, which overrides it."""

    preset: str = "grpo"
    """The named LossSpec that the other fields override."""

    def spec(self, **filled: Any) -> LossSpec:
        """The LossSpec; `filled` (what the rollout and the model's head decide) where unset."""
        if self.preset not in PRESETS:
            raise ValueError(f"preset = {self.preset!r}: expected one of {sorted(PRESETS)}")
        given = self.model_dump(exclude={"preset"}, exclude_none=True)
        return LossSpec(**{**filled, **PRESETS[self.preset], **given})

    @pydantic.model_validator(mode="after")
    def _is_a_loss(self) -> _LossBase:
        self.spec()
        return self


def _attribute_docstrings(cls: type) -> dict[str, str]:
    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(ast.Constant(str(doc))):
                docs[name] = inspect.cleandoc(doc)
    return docs


def _loss_fields() -> dict[str, Any]:
    """Every LossSpec field as an optional one: a new loss option is written in one place."""
    hints, docs = get_type_hints(LossSpec), _attribute_docstrings(LossSpec)
    return {
        f.name: (Union[hints[f.name], None], Field(None, description=docs.get(f.name)))  # noqa: UP007
        for f in dataclasses.fields(LossSpec)
    }


if TYPE_CHECKING:
    LossConfig = _LossBase
else:
    LossConfig = pydantic.create_model(
        "LossConfig", __base__=_LossBase, __doc__=_LossBase.__doc__, **_loss_fields()
    )
