from .config import PRESETS as PRESETS
from .config import TrainingConfig as TrainingConfig
from .config import preset as preset
from .progress import Progress as Progress
from .run import train as train
from .trainer import Trainer as Trainer
