"""Pages of a PDF as pictures, and the task that reads them."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_core.errors import InvalidParamsError, MediaDecodeError, MediaTooLargeError, MissingExtraError
from mm_core.hookspecs import Checkpoint, Task, hookimpl
from mm_core.types import RequestOutput, TaskRequest, TextPrompt

if TYPE_CHECKING:
    from PIL import Image

DPI = 96  # as the original renders pages
MAX_DPI = 600
MAX_PIXELS = 2**26
_POINTS = 72


@dataclass(frozen=True)
class Document:
    """Markdown by page, in the order of `numbers` (the first page is 0); text: all of it."""

    numbers: tuple[int, ...]
    pages: tuple[str, ...]

    @property
    def text(self) -> str:
        """The pages, an empty line between them."""
        return "\n\n".join(self.pages)


def pdf_pages(pdf: str | Path | bytes, pages: Sequence[int] | None = None, dpi: float = DPI) -> list[Image.Image]:
    """RGB pictures of a PDF's pages (all, or those numbered in `pages`, from 0). pdf: path or content.

    Raises MissingExtraError, MediaDecodeError for what is no PDF, MediaTooLargeError for pages over 64
    megapixels, InvalidParamsError for pages it does not have.
    """
    try:
        import pypdfium2
    except ImportError as error:
        raise MissingExtraError(
            'Reading PDFs needs pypdfium2. Install it with `pip install "mm-plugin-nougat[pdf]"`.'
        ) from error
    if type(dpi) not in (int, float) or not 0 < dpi <= MAX_DPI:
        raise InvalidParamsError(f"dpi={dpi!r} is not a number above 0 and up to {MAX_DPI}.", param="dpi")
    try:
        document = pypdfium2.PdfDocument(pdf)
    except (pypdfium2.PdfiumError, OSError, TypeError) as error:
        raise MediaDecodeError(
            "The PDF cannot be read: damaged, encrypted, or no PDF at all.", code="invalid_pdf"
        ) from error
    with document:
        chosen = range(len(document)) if pages is None else pages
        wrong = [n for n in chosen if type(n) is not int or not 0 <= n < len(document)]
        if wrong:
            raise InvalidParamsError(f"The PDF has pages 0 to {len(document) - 1}, not {wrong[0]!r}.", param="pages")
        return [_render(document[number], dpi / _POINTS) for number in chosen]


def _render(page: Any, scale: float) -> Image.Image:
    width, height = page.get_size()
    if width * height * scale**2 > MAX_PIXELS:
        raise MediaTooLargeError(f"A page of {width:.0f}×{height:.0f} points has too many pixels. Lower dpi.")
    image: Image.Image = page.render(scale=scale).to_pil()
    return image.convert("RGB")


def read(
    *,
    pdf: str | Path | bytes,
    pages: Sequence[int] | None = None,
    dpi: float = DPI,
    params: Any = None,
) -> Generator[Sequence[TaskRequest], Sequence[RequestOutput], Document]:
    """Task "read": a PDF to a `Document`, all pages at once. params: SamplingParams, greedy to the context's
    end where None."""
    from mm_core import SamplingParams

    images = pdf_pages(pdf, pages, dpi)
    params = SamplingParams(temperature=0.0, max_tokens=None) if params is None else params
    outputs = yield [TaskRequest(TextPrompt(prompt="", multi_modal_data={"image": image}), params) for image in images]
    numbers = tuple(range(len(images)) if pages is None else pages)
    return Document(numbers, tuple(output.text.strip() for output in outputs))


@hookimpl
def mm_tasks(family: str, checkpoint: Checkpoint) -> Mapping[str, Task]:  # noqa: ARG001
    """ "read": a PDF to Markdown."""
    return {"read": read}
