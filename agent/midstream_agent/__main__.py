"""`python -m midstream_agent`."""

import sys

from midstream_agent.main import main

sys.exit(main())
