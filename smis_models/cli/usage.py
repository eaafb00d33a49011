"""What is said of a command line that cannot be read: one line, for any version of typer."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand

from ..io.choices import unknown_name

# Typer has click beside it or inside, as its version is.
USAGE_ERROR: Any = typer.BadParameter.__base__

_KINDS = {int: ("a whole number", "NUMBER"), float: ("a number", "NUMBER"),
          Path: ("a path", "PATH"), str: ("a text", "TEXT")}
_WORDS = "smis_words"


class Command(TyperCommand):
    """A command whose errors know its words, and that takes no option for another one's value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_WORDS] = list(args)
        try:
            _refuse_lost_values(self, ctx, args)
            _refuse_lost_paths(self, args)
            return super().parse_args(ctx, args)
        except USAGE_ERROR as error:
            error.ctx = error.ctx or ctx
            raise


def _name(parameter: Any) -> str:
    """What an option or argument is called."""
    return str(parameter.opts[0]).lstrip("-")


def _refuse_lost_values(command: Any, context: Any, words: list[str]) -> None:
    """Refuse an option in the place of another's value: the value was forgotten."""
    options = {name: p for p in command.params if p.param_type_name == "option"
               for name in (*p.opts, *p.secondary_opts)}
    names = {*options, *context.help_option_names}
    k = 0
    while k < len(words) and words[k] != "--":
        parameter = options.get(words[k])
        k += 1
        if parameter is None or parameter.is_flag or k == len(words):
            continue
        if words[k].partition("=")[0] in names:
            raise USAGE_ERROR(f"{_name(parameter)}: expected {_expected(command, parameter)[0]} "
                              f"behind {words[k - 1]}, got the option "
                              f"{words[k].partition('=')[0]}; give the value first")
        k += 1


def _refuse_lost_paths(command: Any, words: list[str]) -> None:
    """Refuse an empty path, which would mean this folder, and a second one that hides the first."""
    places = iter(_places(command, words))
    for parameter in command.params:
        given = (list(_values(words, parameter)) if parameter.param_type_name == "option"
                 else [next(places, ".")])
        if _expected(command, parameter)[0] != _KINDS[Path][0]:
            continue
        if "" in given:
            raise USAGE_ERROR(f"{_name(parameter)}: expected a path, got an empty one; give . for "
                              "this folder")
        if not getattr(parameter, "multiple", False) and len(set(given)) > 1:
            raise USAGE_ERROR(f"{_name(parameter)}: expected one path, got "
                              f"{' and '.join(map(repr, given))}; give a folder of them, or the "
                              "command once for each")


def _places(command: Any, words: list[str]) -> Iterator[str]:
    """The words that are neither options nor their values."""
    valued = {name for p in command.params if p.param_type_name == "option" and not p.is_flag
              for name in p.opts}
    for before, word in zip(["", *words], words, strict=False):
        if before not in valued and word[:1] != "-":
            yield word


def _values(words: list[str], parameter: Any) -> Iterator[str]:
    """The values that a command line gives an option, in order."""
    for word, after in zip(words, [*words[1:], None], strict=True):
        if word == "--":
            return
        name, equals, value = word.partition("=")
        if name in parameter.opts and (equals or after is not None):
            yield value if equals else str(after)


def _leaves(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of, and the notes beside them."""
    parts = get_args(annotation)
    if not parts:
        yield annotation
    for part in parts:
        yield from _leaves(part)


def _expected(command: Any, parameter: Any) -> tuple[str, str]:
    """What a parameter takes: in words, and as its place is marked."""
    hints = get_type_hints(inspect.unwrap(command.callback), include_extras=True)
    leaves = list(_leaves(hints.get(parameter.name)))
    text, mark = next((_KINDS[leaf] for leaf in leaves if leaf in _KINDS), ("a value", "VALUE"))
    for leaf in leaves:
        low, high = getattr(leaf, "min", None), getattr(leaf, "max", None)
        if isinstance(leaf, type) or (low is None and high is None):
            continue
        if low is None or high is None:
            text += f" of at least {low}" if high is None else f" of at most {high}"
        else:
            text += f" from {low} to {high}"
    return text, mark


def _given(context: Any, parameter: Any) -> str | None:
    """The value that the command line gives an option last."""
    return next(reversed(list(_values(context.meta.get(_WORDS, []), parameter))), None)


def _wrong_option(error: Any, context: Any, command: str) -> str:
    """An option that there is not, that lacks its value, or that takes none."""
    given = str(error.option_name)
    if hasattr(error, "possibilities"):
        text = f"option: expected one that `{command}` takes, got {given!r}"
        if context is not None and context.parent is not None:
            root = context.find_root()
            if any(given in p.opts for p in root.command.params):
                rest = command.removeprefix(f"{root.command_path} ")
                return f"{text}; give it first: `{root.command_path} {given} {rest} ...`"
        close = list(error.possibilities or ())
        return text + (f"; did you mean {close[0]}?" if close else "")
    parameters = () if context is None else context.command.params
    for parameter in parameters:
        if given not in (*parameter.opts, *parameter.secondary_opts):
            continue
        if parameter.is_flag:
            got = _given(context, parameter)
            return f"{_name(parameter)}: expected {given} alone, got the value {got!r}"
        text, mark = _expected(context.command, parameter)
        return f"{_name(parameter)}: expected {text}, got nothing; give {given} {mark}"
    return f"{given.lstrip('-')}: {error.format_message()}"


def _text(error: Any, context: Any, command: str) -> str:
    if hasattr(error, "option_name"):
        return _wrong_option(error, context, command)
    parameter, message = getattr(error, "param", None), error.format_message()
    if parameter is not None and context is not None:
        expected, mark = _expected(context.command, parameter)
        if hasattr(error, "param_type"):  # it is missing
            what = parameter.opts[0] if parameter.param_type_name == "option" else ""
            place = f"{what} {mark}" if what else parameter.name.upper()
            return f"{_name(parameter)}: expected {expected}, got nothing; give {place}"
        got = _given(context, parameter)
        if got is not None:
            return f"{_name(parameter)}: expected {expected}, got {got!r}"
        return f"{_name(parameter)}: {message.partition(': ')[2] or message}"
    commands = getattr(getattr(context, "command", None), "commands", None)
    unknown = re.search(r"[Nn]o such command '(.*?)'", message)
    if commands and unknown:
        return unknown_name("command", commands, unknown[1])
    more = re.search(r"extra arguments?(?:\(s\))? \((.*)\)", message, re.S)
    if more and context is not None:
        places = " ".join(p.name.upper() for p in context.command.params
                          if p.param_type_name == "argument")
        expected = f"{places} and options" if places else "options alone"
        return (f"arguments: expected {expected}, got {more[1]!r} besides; quote a name that has "
                "spaces, and give an option again for each of its values")
    return str(message)


def usage_line(error: Any) -> str:
    """What is said of an error of usage: the option, what was expected, what came, the cure."""
    context, command = error.ctx, "smis"
    if context is not None:
        command = context.command_path
    elif len(sys.argv) > 1 and sys.argv[1][:1] != "-":
        command += f" {sys.argv[1]}"
    text = _text(error, context, command).rstrip(".")
    return f"{text}; `{command} --help` shows what it takes"
