"""Let the others wait for the first process, with a timeout and for as long as it works: test_devices."""

import sys
import time
from datetime import timedelta

from clinical_lf.plan import make_accelerator

accelerator = make_accelerator(timeout=timedelta(seconds=float(sys.argv[1])))
with accelerator.main_process_first():
    if accelerator.is_main_process:
        time.sleep(float(sys.argv[2]))
accelerator.wait_for_everyone()
