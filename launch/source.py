"""The source for the machines: a tarball of one commit, or of one tree, which is named by its hash."""

import os
import pathlib
import subprocess
import tarfile
import tempfile

from tvq_pod.errors import UserError
from tvq_pod.host.files import replacing

ROOT = pathlib.Path(__file__).resolve().parent.parent


def pack(folder: pathlib.Path, allow_dirty: bool, write: bool = True) -> str:
    """Writes FOLDER/NAME.tar.gz, and returns NAME: tvq_pod-COMMIT, or with uncommitted changes
    tvq_pod-COMMIT-dirty-TREE, where TREE is the hash of all tracked files. Files that git does not track are never
    included, so no stray secrets are. Raises UserError for uncommitted changes, unless allow_dirty."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    name, tree = f"tvq_pod-{commit}", "HEAD"
    changed = _git("status", "--porcelain", "--untracked-files=no").splitlines()
    if changed:
        if not allow_dirty:
            raise UserError(
                f"--allow_dirty=False: {len(changed)} file(s) differ from commit {commit} (the first: "
                f"{changed[0].split()[-1]}); commit them, or give --allow_dirty"
            )
        with tempfile.TemporaryDirectory() as scratch:  # a separate index: the user's is not touched
            index = dict(GIT_INDEX_FILE=os.path.join(scratch, "index"))
            _git("read-tree", "HEAD", **index)
            _git("add", "--update", ".", **index)
            tree = _git("write-tree", **index)
        name += f"-dirty-{tree[:12]}"
    if not write:
        return name
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"{name}.tar.gz"
    if not path.exists():
        with replacing(path, by_many=True) as draft:
            _git("archive", "--format=tar.gz", f"--prefix={name}/", f"--output={draft}", tree)
    return name


def files(tarball: pathlib.Path, may_lack: bool = False) -> dict[str, bytes | None]:
    """Returns the content of the files in a tarball of `pack`, by their paths in the project. Raises UserError.

    may_lack: a missing tarball is not an error; the result then has the files of HEAD, with None for their content.
    """
    try:
        with tarfile.open(tarball) as tar:
            opened = {member.name: tar.extractfile(member) for member in tar.getmembers() if member.isfile()}
            return {name.partition("/")[2]: file.read() for name, file in opened.items() if file is not None}
    except FileNotFoundError:
        if may_lack:
            return dict.fromkeys(_git("ls-tree", "-r", "--name-only", "-z", "HEAD").split("\0"))
        raise UserError(f"{tarball}: does not exist; `up` makes it") from None
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{tarball}: cannot be read ({error}); delete it, and `up` makes it again") from None


def _git(*arguments: str, **environment: str) -> str:
    if not (ROOT / "pyproject.toml").is_file():  # git might find an unrelated repository around this package
        raise UserError(f"{ROOT}: is not a clone of tvq_pod; machines get a commit, so start launch.pod from a clone")
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True
        )
    except FileNotFoundError:
        raise UserError("git: is not on the PATH; the machines get a tarball of this commit") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"git {arguments[0]}: {error.stderr.strip()}; start launch from a clone") from None
    return done.stdout.strip()
