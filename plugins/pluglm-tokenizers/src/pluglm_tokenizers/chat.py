"""Renders a model's chat template with plain data, in the sandbox of `sandbox.py`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2

from pluglm.errors import ConfigError, InputError
from pluglm_tokenizers.sandbox import RefusedError, TemplateSandbox, UnboundedError


class ChatTemplates:
    """The templates of one tokenizer; each is compiled when it is first used.

    Args:
        sources: templates by name; "default" is the usual one, "tool_use" is for calls with tools.
        tokens: "bos_token" -> its text; templates know them by these names. path: of the folder, for messages.
    """

    def __init__(self, sources: Mapping[str, str], tokens: Mapping[str, str], path: str) -> None:
        self._sources, self._tokens, self._path = sources, tokens, path
        self._compiled: dict[str, jinja2.Template] = {}
        self._sandbox = TemplateSandbox()
        self._lock = threading.Lock()

    def render(
        self, messages: Sequence[Any], variables: Mapping[str, Any], *, add_generation_prompt: bool,
        plain_json: Callable[[str], str],
    ) -> str:  # fmt: skip
        """The text of a chat.

        Args:
            variables: further names for the template. plain_json: applied to what `tojson` writes.
        Raises: InputError without a template, for messages that are no chat, and if the template refuses or fails.
        """
        name = "tool_use" if variables.get("tools") and "tool_use" in self._sources else "default"
        if name not in self._sources:
            raise InputError(
                "this model has no chat template.",
                why=f'neither tokenizer_config.json nor chat_template.jinja in "{self._path}" holds one: it is a base '
                "model, or its publisher left the template out.",
                fix="Pass a text instead of messages, or put the model family's chat_template.jinja into the folder.",
                argument="messages",
            )  # fmt: skip
        if not messages or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
            raise InputError("a chat is a list of at least one message with a role.",
                             fix="Write [{'role': 'user', 'content': 'Hi'}].", argument="messages")  # fmt: skip
        template = self._template(name)
        context = {
            "tools": None, "documents": None, **self._tokens, **variables,
            "messages": messages, "add_generation_prompt": add_generation_prompt,
            "raise_exception": _raise, "strftime_now": _now,
        }  # fmt: skip
        try:
            return self._sandbox.run(template, context, plain_json)
        except _Refusal as e:
            raise InputError("the chat template refuses these messages.", why=str(e),
                             fix="Change the messages as it asks.", argument="messages") from e  # fmt: skip
        except (UnboundedError, RefusedError, RecursionError, MemoryError) as e:
            raise InputError(
                "the chat template was stopped.", why=str(e) or type(e).__name__,
                fix="Shorten the messages; if that does not help, the model's template is broken or hostile.",
                argument="messages",
            ) from e  # fmt: skip
        except Exception as e:
            raise InputError(
                "the chat template failed on these messages.", why=f"{type(e).__name__}: {e}",
                fix="Check roles, contents and variables against the model's documentation.", argument="messages",
            ) from e  # fmt: skip

    def _template(self, name: str) -> jinja2.Template:
        with self._lock:
            if name not in self._compiled:
                try:
                    self._compiled[name] = self._sandbox.from_string(self._sources[name])
                except (jinja2.TemplateError, RefusedError, RecursionError, MemoryError, ValueError) as e:
                    raise ConfigError(
                        f'the chat template in "{self._path}" cannot be compiled.', why=f"{type(e).__name__}: {e}",
                        fix="Repair chat_template.jinja, or download the model again.", path=self._path,
                        key="chat_template",
                    ) from e  # fmt: skip
            return self._compiled[name]


class _Refusal(jinja2.TemplateError):
    """The template called raise_exception."""


def _raise(message: str) -> None:
    raise _Refusal(str(message))


def _now(form: str) -> str:
    if len(form) > 100:
        raise UnboundedError("strftime_now is asked for a format of more than 100 characters")
    return datetime.now().strftime(form)
