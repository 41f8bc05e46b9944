"""The names of evaluation suites, as in --suite."""

from tvq_pod.errors import UserError

RETRIEVAL = ("passkey", "needle", "pair")  # by length and depth
SUITES = ("recall", *RETRIEVAL)


def check_suites(names: list[str]) -> None:
    """Raises UserError if there is no name, a name that is not in SUITES, or one that is given twice."""
    given = f"--suite={','.join(names)}"
    if not names:
        raise UserError(f"{given}: names no suite; give some of {', '.join(SUITES)}")
    for name in names:
        if name not in SUITES:
            raise UserError(f"{given}: {name} is not a suite; give some of {', '.join(SUITES)}")
        if names.count(name) > 1:
            raise UserError(f"{given}: has {name} twice; give it once")
