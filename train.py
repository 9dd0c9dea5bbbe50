"""Train the configuration in conf/: `python train.py` is the same as `mbgd train` of an installed mbgd."""

import sys

from mbgd.workers.parent import end_with_parent

end_with_parent()

from mbgd.cli.train import train  # noqa: E402

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
