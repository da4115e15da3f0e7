#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# khod's restore stage for an initrd that dracut builds: docs/initrd.md. Off unless asked for: dracut --add khod.

check() {
    type -P khoctl > /dev/null || return 1
    return 255
}

depends() {
    return 0
}

install() {
    khoctl initrd add "$initdir" ${kernel:+--release "$kernel"} > /dev/null
}
