"""The web page of `pet-pipeline app`, on which images are drawn, edited, compared and classified.

[`launch`] takes a pipeline through these modules: `server` serves the page and limits what visitors may ask
for, `page` lays out its components, `handlers` answers its events, `tasks` does the work with the model, and
`html` shows the results. Images travel inside the page as data URLs. The only files on disk are uploads that
have not been read yet.
"""

from .server import launch, serve


__all__ = ["launch", "serve"]
