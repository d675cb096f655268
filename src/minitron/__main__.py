import sys

from minitron.cli.main import main

sys.exit(main())
