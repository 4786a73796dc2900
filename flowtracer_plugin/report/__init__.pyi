from .pages.comparison_page import (
    render_comparison as render_comparison,
    write_comparison as write_comparison,
)
from .pages.completion import CompletionView as CompletionView, GroupCredit as GroupCredit
from .pages.group_index import write_index as write_index
from .pages.group_page import group_page as group_page, write_group_page as write_group_page
from .pages.groups_page import (
    render_group_comparison as render_group_comparison,
    write_group_comparison as write_group_comparison,
)
from .pages.trace_page import (
    render_notebook as render_notebook,
    render_page as render_page,
    write_page as write_page,
)
