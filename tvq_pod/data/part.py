"""Writing one part of a store, by one worker on its own: its task can be sent to another process or machine, and its
output depends on nothing else."""

import dataclasses
from collections.abc import Callable

from etils import epath

from tvq_pod.config.settings import DataSettings
from tvq_pod.data.checked import Checked, write_batch
from tvq_pod.data.corpora import blocks_of
from tvq_pod.data.cut import check_unchanged, numbered
from tvq_pod.data.place import only_one
from tvq_pod.data.sources import File, Listing
from tvq_pod.data.store import FILES, TokenStore, made_with
from tvq_pod.data.vocab import Vocab
from tvq_pod.data.writer import StoreWriter
from tvq_pod.errors import UserError


@dataclasses.dataclass(frozen=True)
class PartTask:
    """One part to write. folder: where the part will be. listing: of its files alone. signature: the files' signature
    when the corpus was cut. data: how they are read. n_bytes: the size of the files."""

    folder: str
    listing: Listing
    signature: str
    data: DataSettings
    n_bytes: int

    @staticmethod
    def of(
        folder: epath.Path, files: list[File], signature: str, listing: Listing, data: DataSettings, n_bytes: int
    ) -> "PartTask":
        """Returns the task for some files of a listing."""
        mine = dataclasses.replace(listing, files=files, left_out={}, walks=[], note="")
        return PartTask(str(folder), mine, signature, data, n_bytes)

    @property
    def made_with(self) -> dict:
        """All that its documents depend on besides the vocabulary, including what `auto` meant for all files."""
        return made_with(self.data) | dict(format=self.listing.format, holdout=self.listing.holdout)

    def numbered(self, before: dict[tuple[str, int], int]) -> "PartTask":
        """Returns the task with the number of lines before each part of a file; see `lines_before`."""
        return dataclasses.replace(
            self, listing=dataclasses.replace(self.listing, files=numbered(self.listing.files, before))
        )

    def is_done(self, vocab: Vocab) -> bool:
        """Returns whether the part exists and was made from these files as they were cut; False for a Hugging Face
        dataset, for which that is not known."""
        if any(file.kind == "hf" for file in self.listing.files):
            return False
        folder = epath.Path(self.folder)
        try:
            store, files = TokenStore(folder), (folder / FILES).read_text()
        except (UserError, OSError, ValueError):
            return False
        made = store.meta["vocab"], store.meta["made_with"], files
        return made == (vocab.name, self.made_with, self.signature)


def write_part(task: PartTask, vocab: Vocab, tell: Callable[[int], object]) -> None:
    """Writes a part. tell: called with the bytes of text taken since its last call; an exception it raises ends the
    part. Raises UserError for documents that can't be taken, or files that change meanwhile."""
    with only_one(task.folder):  # a worker whose main process was killed may not have ended yet
        if task.is_done(vocab):
            return
        check_unchanged(task.listing, task.signature)
        folder = epath.Path(task.folder)
        if folder.exists():  # made from other files, or damaged
            folder.rmtree()
        with StoreWriter(folder, vocab, task.made_with, is_part=True) as writer:
            checked = Checked(blocks_of(task.listing, task.data), vocab, task.data, counts=False)
            for batch in checked:
                tell(batch.n_bytes)
                write_batch(batch, writer.splits, vocab)
            check_unchanged(task.listing, task.signature)
            writer.finish(task.signature, own_splits=checked.own_splits, report=checked.report.to_json())
