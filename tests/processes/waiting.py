"""Let the others wait for the first process, with a timeout and for as long as it works: test_devices."""

import sys
import time
from datetime import timedelta

import train

accelerator = train.make_accelerator(train.Settings(), timedelta(seconds=float(sys.argv[1])))
with accelerator.main_process_first():
    if accelerator.is_main_process:
        time.sleep(float(sys.argv[2]))
accelerator.wait_for_everyone()
