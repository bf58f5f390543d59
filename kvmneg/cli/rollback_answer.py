# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `kvmneg rollback check` prints of the daemon's answer: the verdict, every reason, and the scope."""

from __future__ import annotations

from kvmneg.cli import sources
from kvmneg.cli.output import Screen, count, print_json
from kvmneg.features.difference import Blocker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SHORT = 19  # characters of a digest for people


def tell(answer: dict[str, Any], *, as_json: bool) -> int:
    """Print an answer of org.kvmneg.Rollback.Check; returns the exit status, 0 for a yes."""
    status = 0 if answer["allowed"] else 1
    if as_json:
        print_json(_document(answer))
    else:
        _show(Screen(), answer)
    return status


def _document(answer: dict[str, Any]) -> dict[str, Any]:
    document = sources.snake(answer)
    document |= _reasons(answer)
    if answer["prediction"]:
        document["prediction"] = {**answer["prediction"], **_reasons(answer["prediction"])}
    if not answer["allowed"]:
        document = {"error": {"name": "org.kvmneg.Blocked", "message": _message(answer)}, **document}
    return document


def _reasons(part: dict[str, Any]) -> dict[str, Any]:
    """The reasons of an answer or a prediction, as documents spell them."""
    guests = [{**held, "blockers": _rows(held["blockers"])} for held in part["guests"]]
    return {"blockers": _rows(part["blockers"]), "guests": guests}


def _rows(blockers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [Blocker.from_json(row).to_json() for row in blockers]


def _message(answer: dict[str, Any]) -> str:
    """Why not, in one line."""
    if not answer["measured"]:
        return "that combo was never measured here"
    reasons = []
    if answer["blockers"]:
        reasons.append(f"it lacks {count(len(answer['blockers']), 'feature')} of the fence")
    guests = sum(held["count"] for held in answer["guests"])
    if guests:
        reasons.append(f"{count(guests, 'guest')} could not run there")
    if answer["unknown"]:
        reasons.append(f"of {count(answer['unknown'], 'guest')} nobody knows what they hold")
    return "; ".join(reasons)


def _show(screen: Screen, answer: dict[str, Any]) -> None:
    if answer["allowed"]:
        screen.line(f"{screen.good('yes')}: this host may go to {answer['combo'][:_SHORT]}")
    else:
        screen.line(f"{screen.bad('no')}: {_message(answer)}")
    if not answer["measured"]:
        _show_unmeasured(screen, answer)
    screen.blockers(Blocker.from_json(row) for row in answer["blockers"])
    _show_guests(screen, answer["guests"])
    if answer["unknown"]:
        names = answer["unknownGuests"] or [f"{answer['unknown']}, which an admin is told by name"]
        screen.words("unknown", names)
    if answer["changes"]:
        screen.head("it holds only where each of these is as recorded")
        _show_dimensions(screen, answer["changes"], "now")
    if answer["prediction"]:
        _show_prediction(screen, answer["prediction"])
    screen.scope(answer["scope"])


def _show_unmeasured(screen: Screen, answer: dict[str, Any]) -> None:
    if answer["nearest"]:
        screen.head(f"the nearest that was, {answer['nearest'][:_SHORT]}, is another in")
        _show_dimensions(screen, answer["differs"], "asked")
    screen.head("how to measure it")
    screen.paragraph(answer["how"], indent=2)


def _show_dimensions(screen: Screen, rows: list[dict[str, Any]], ours: str) -> None:
    from kvmneg.policy.combos import for_people

    found = {row["dimension"]: row for row in rows}
    for row in map(found.__getitem__, for_people(list(found))):
        sides = ((ours, row["asked"]), ("recorded", row["recorded"]))
        words = [f"{side} {'-' if value is None else value or 'empty'}" for side, value in sides]
        screen.words(row["dimension"], ", ".join(words).split(" "), column=24)


def _show_guests(screen: Screen, guests: list[dict[str, Any]]) -> None:
    for held in guests:
        names = held["vms"] or [f"{count(held['count'], 'guest')} of other users"]
        screen.words("guest" if held["count"] == 1 else f"{held['count']} guests", names)
        screen.blockers(Blocker.from_json(row) for row in held["blockers"])


def _show_prediction(screen: Screen, told: dict[str, Any]) -> None:
    screen.head(str(told["label"]))
    screen.words("from", str(told["source"] or "no table").split(" "))
    for name in ("lost", "gained"):
        screen.words(name, told[name] or ["nothing"])
    if told["blockers"]:
        features = dict.fromkeys(row["feature"] for row in told["blockers"])
        screen.words("of the fence", [*features, "would be missing"])
    guests = sum(held["count"] for held in told["guests"])
    screen.words("guests", [f"{guests} would be in the way" if guests else "none would be in the way"])
    for note in told["notes"]:
        screen.paragraph(note, indent=2, style="dim")
