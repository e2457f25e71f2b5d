"""The signals that ask a process to stop."""

import signal

# Of Ctrl-C, of a terminal that closes, of schedulers. Where processes received
# several, the last one of these counts.
STOPPING = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
