from .cutting import KnockOutError as KnockOutError
