from sandbox_runs import kernel as kernel
from sandbox_runs import mark as mark
