//! The one place where the library speaks without being asked: what happened to fibers nobody joins, and at shutdown.

use std::fmt;
use std::sync::RwLock;

type Hook = Box<dyn Fn(&str) + Send + Sync>;

static HOOK: RwLock<Option<Hook>> = RwLock::new(None);

/// Sends the library's few messages (a panic in a fiber nobody joins, fibers left at shutdown) to `hook` rather than to
/// standard error. The hook is given one line without its end; it must not call sockets.
///
/// ```
/// ringsock::set_log_hook(|line| eprintln!("[net] {line}"));
/// ```
pub fn set_log_hook(hook: impl Fn(&str) + Send + Sync + 'static) {
    if let Ok(mut place) = HOOK.write() {
        *place = Some(Box::new(hook));
    }
}

#[cold]
pub(crate) fn log(message: fmt::Arguments<'_>) {
    let line = message.to_string();
    match HOOK.read() {
        Ok(hook) if hook.is_some() => {
            if let Some(hook) = &*hook {
                hook(&line);
            }
        }
        _ => eprintln!("ringsock: {line}"),
    }
}
