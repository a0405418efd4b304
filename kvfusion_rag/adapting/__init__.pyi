from .options import AdaptOptions as AdaptOptions
from .report import AdaptReport as AdaptReport
from .run import adapt as adapt
