"""`mbgd COMMAND …`, also as `python -m mbgd COMMAND …`: training, projects of one's own, and tools for runs."""

import sys

from mbgd.workers.parent import end_with_parent

end_with_parent()

from mbgd.cli.commands import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
