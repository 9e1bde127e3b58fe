from .core import BaseAgent as Foundation
