"""A session as one HTML page without links."""

from __future__ import annotations

import jinja2
import numpy as np

from ..io.images import data_uri
from .painter import Painter, Session


def report(painter: Painter, session: Session, weights: str) -> str:
    """The session's last steps, each map beside its picture, and the classes in them."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("smis_models.app", "page"), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )
    colours, names = painter.colours, painter.class_names
    shown = np.unique(np.stack([step.labels for step in session.steps]))
    height, width = painter.size
    return environment.get_template("session.html").render(
        model=painter.model.name, weights=weights, height=height, width=width,
        random=painter.random_weights,
        classes=[(names[c], f"rgb{tuple(colours[c].tolist())}") for c in shown],
        steps=[(step.caption, data_uri(colours[step.labels]), data_uri(step.picture))
               for step in reversed(session.steps)],
    )
