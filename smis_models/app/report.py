"""Pages without links: a template and what it shows; of a session its report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from ..io.images import data_uri

if TYPE_CHECKING:
    from .painter import Painter, Session


def rendered(template: str, **values: Any) -> str:
    """A template of this package with its values."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("smis_models.app", ""), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    return environment.get_template(template).render(**values)


def report(painter: Painter, session: Session, weights: str) -> str:
    """The session's last steps, each map beside its picture, and the classes in them."""
    colours, names = painter.colours, painter.class_names
    shown = np.unique(np.stack([step.labels for step in session.steps]))
    height, width = painter.size
    return rendered(
        "page/session.html",
        model=painter.model.name, weights=weights, height=height, width=width,
        random=painter.random_weights,
        classes=[(names[c], f"rgb{tuple(colours[c].tolist())}") for c in shown],
        steps=[(step.caption, data_uri(colours[step.labels]), data_uri(step.picture))
               for step in reversed(session.steps)],
    )
