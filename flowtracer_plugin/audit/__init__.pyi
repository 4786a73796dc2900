from .policy_gradient import named_parameters as named_parameters
from .run import (
    AuditOptions as AuditOptions,
    BatchAudit as BatchAudit,
    NoSignalError as NoSignalError,
    Tilt as Tilt,
    audit as audit,
)
from .sampling import Group as Group, rewarded as rewarded, sample as sample
from .summary import (
    AuditSummary as AuditSummary,
    Difference as Difference,
    ScorerAudit as ScorerAudit,
    holm as holm,
    summarise_audit as summarise_audit,
)
