"""Records whose later keys stay out of their dump at their defaults, so that recipes written before keep their hash."""

from typing import Any, ClassVar

from pydantic import SerializerFunctionWrapHandler, model_serializer

from flashdiff.config import Record


class GrownRecord(Record):
    """A record that names the keys it has got since recipes with it were first used."""

    LATER: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, write: SerializerFunctionWrapHandler) -> Any:
        values: dict[str, Any] = write(self)
        fields = type(self).model_fields
        return {
            name: value for name, value in values.items() if name not in self.LATER or getattr(self, name) != fields[name].default
        }
