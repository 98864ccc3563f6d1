"""The log as one JSON object a line, for log collectors."""

import json
import logging
from datetime import datetime

FIELDS = "fields"
"""The attribute of a record that holds what its message says, by name."""


class JsonFormatter(logging.Formatter):
    """Time with its zone, level, logger and message; a call's fields by name; an exception's traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def write_json() -> None:
    """Have the root logger's handlers write JSON from now on."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonFormatter())
