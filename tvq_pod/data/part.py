"""Writing one part of a store, by one worker on its own: what it needs can be sent to another process or machine, and
what it writes depends on nothing else."""

import dataclasses
from collections.abc import Callable

from etils import epath

from tvq_pod.config.settings import DataSettings
from tvq_pod.data.checked import Checked, write_batch
from tvq_pod.data.corpora import documents_of
from tvq_pod.data.cut import numbered, signature
from tvq_pod.data.place import only_one
from tvq_pod.data.sources import File, Listing
from tvq_pod.data.store import FILES, TokenStore, made_with
from tvq_pod.data.vocab import Vocab
from tvq_pod.data.writer import StoreWriter
from tvq_pod.errors import UserError


@dataclasses.dataclass(frozen=True)
class PartTask:
    """folder: where the part will be. listing: of its files alone. signature: theirs when the corpus was cut. data: how
    they are read. n_bytes: of the files."""

    folder: str
    listing: Listing
    signature: str
    data: DataSettings
    n_bytes: int

    @staticmethod
    def of(
        folder: epath.Path, files: list[File], signature: str, listing: Listing, data: DataSettings, n_bytes: int
    ) -> "PartTask":
        """Of some files of a listing."""
        mine = dataclasses.replace(listing, files=files, left_out={}, walks=[], note="")
        return PartTask(str(folder), mine, signature, data, n_bytes)

    def numbered(self, before: dict[tuple[str, int], int]) -> "PartTask":
        """With the number of lines before each part of a file; see `lines_before`."""
        return dataclasses.replace(
            self, listing=dataclasses.replace(self.listing, files=numbered(self.listing.files, before))
        )

    def check_unchanged(self) -> None:
        """Raises UserError if a file is no longer what was cut."""
        if signature(self.listing.files) != self.signature:
            raise UserError(
                f"config.data.source={self.listing.source}: has changed while it was read "
                f"({self.listing.files[0].name} and what follows); start again"
            )

    def is_done(self, vocab: Vocab) -> bool:
        """Whether the part is there, of these files as they were cut. Of a Hugging Face dataset that is not known."""
        if any(file.kind == "hf" for file in self.listing.files):
            return False
        folder = epath.Path(self.folder)
        try:
            store, files = TokenStore(folder), (folder / FILES).read_text()
        except (UserError, OSError, ValueError):
            return False
        made = store.meta["vocab"], store.meta["made_with"], files
        return made == (vocab.name, made_with(self.data), self.signature)


def write_part(task: PartTask, vocab: Vocab, tell: Callable[[int], object]) -> None:
    """Writes a part. tell: is called with the bytes of text that were taken since it was called last; what it raises
    ends the part. Raises UserError for documents that can't be taken, or files that change meanwhile."""
    with only_one(task.folder):  # a worker of before, whose main process was killed, may not have ended yet
        if task.is_done(vocab):
            return
        task.check_unchanged()
        folder = epath.Path(task.folder)
        if folder.exists():  # of other files, or damaged
            folder.rmtree()
        with StoreWriter(folder, vocab, made_with(task.data), is_part=True) as writer:
            checked = Checked(documents_of(task.listing, task.data), vocab, task.data, counts=False)
            for batch in checked:
                tell(batch.n_bytes)
                write_batch(batch, writer.splits, vocab)
            task.check_unchanged()
            writer.finish(task.signature, own_splits=checked.own_splits, report=checked.report.to_json())
