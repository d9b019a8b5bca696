"""Imported first by a command: until it runs, Ctrl-C ends it at once, without a traceback.

`shared.errors.run_main` gives Ctrl-C its usual meaning back.
"""

import os
import signal
import threading

usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
if usual and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# transformers' advice about torchvision and its loading bars are not for our users.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
