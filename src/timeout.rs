//! Python's timeout values: `None`, an integer or a float of seconds, or a [`Duration`].

use std::time::Duration;

use crate::error::{Error, Result};

const NS_PER_S: f64 = 1e9;

/// A timeout as Python's `settimeout` takes it, checked where it is used.
///
/// It converts from `f64`, `f32`, integers and [`Duration`] (seconds), and from `Option<f64>`, so that `settimeout(None)`
/// compiles. `None` waits for ever, 0 does not wait.
///
/// ```
/// use ringsock::Timeout;
/// use std::time::Duration;
///
/// let timeouts: [Timeout; 4] = [2.5.into(), 3.into(), Duration::from_millis(1).into(), None.into()];
/// assert_eq!(timeouts[0].seconds()?, Some(2.5));
/// assert_eq!(timeouts[3].seconds()?, None);
/// assert!(Timeout::from(-1).seconds().is_err());
/// # Ok::<(), ringsock::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timeout(Value);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Value {
    Never,
    Seconds(f64),
    Integer(i128),
    Duration(Duration),
}

impl Timeout {
    /// No timeout: waits for ever.
    pub const NONE: Timeout = Timeout(Value::Never);

    /// The timeout in seconds, as `gettimeout` shows it; `None` is no timeout.
    ///
    /// # Errors
    ///
    /// `Value`: negative or NaN. `Overflow`: more than about 292 years.
    ///
    /// ```
    /// assert_eq!(ringsock::Timeout::from(1.5).seconds()?, Some(1.5));
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn seconds(self) -> Result<Option<f64>> {
        Ok(self.as_ns()?.map(|ns| ns as f64 / NS_PER_S))
    }

    /// Nanoseconds, rounded away from zero as CPython does, so that a tiny timeout never becomes "do not wait".
    pub(crate) fn as_ns(self) -> Result<Option<i64>> {
        let ns = match self.0 {
            Value::Never => return Ok(None),
            Value::Seconds(seconds) => {
                if seconds.is_nan() {
                    return Err(Error::Value("Invalid value NaN (not a number)".into()));
                }
                let ns = seconds * NS_PER_S;
                let ns = if ns < 0.0 { ns.floor() } else { ns.ceil() };
                // The cast saturates; 2^63 as a float is the first value that does not fit.
                if ns >= i64::MAX as f64 || ns < i64::MIN as f64 {
                    // CPython's text for floats.
                    return Err(Error::Overflow(
                        "timestamp out of range for platform time_t".into(),
                    ));
                }
                ns as i64
            }
            Value::Integer(seconds) => seconds
                .checked_mul(1_000_000_000)
                .and_then(|ns| i64::try_from(ns).ok())
                .ok_or_else(too_large)?,
            Value::Duration(duration) => {
                i64::try_from(duration.as_nanos()).map_err(|_| too_large())?
            }
        };
        if ns < 0 {
            return Err(Error::Value("Timeout value out of range".into()));
        }
        Ok(Some(ns))
    }
}

fn too_large() -> Error {
    Error::Overflow("timestamp too large to convert to C _PyTime_t".into())
}

impl From<f64> for Timeout {
    fn from(seconds: f64) -> Timeout {
        Timeout(Value::Seconds(seconds))
    }
}

impl From<f32> for Timeout {
    fn from(seconds: f32) -> Timeout {
        Timeout(Value::Seconds(seconds.into()))
    }
}

macro_rules! from_integer {
    ($($integer:ty)*) => {$(
        impl From<$integer> for Timeout {
            fn from(seconds: $integer) -> Timeout {
                Timeout(Value::Integer(seconds as i128))
            }
        }
    )*};
}
from_integer!(i32 u32 i64 u64 usize);

impl From<Duration> for Timeout {
    fn from(duration: Duration) -> Timeout {
        Timeout(Value::Duration(duration))
    }
}

impl From<Option<f64>> for Timeout {
    fn from(seconds: Option<f64>) -> Timeout {
        seconds.map_or(Timeout::NONE, Timeout::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_as_python_reads_them() {
        let ns = |timeout: Timeout| timeout.as_ns();
        assert_eq!(ns(1.5.into()), Ok(Some(1_500_000_000)));
        assert_eq!(ns(0.0.into()), Ok(Some(0)));
        assert_eq!(ns((-0.0).into()), Ok(Some(0)));
        assert_eq!(ns(1e-10.into()), Ok(Some(1)), "rounds away from zero");
        assert_eq!(ns(3.into()), Ok(Some(3_000_000_000)));
        assert_eq!(ns(None.into()), Ok(None));
        assert_eq!(ns(Duration::from_nanos(7).into()), Ok(Some(7)));
        for negative in [Timeout::from(-1), (-1.0).into(), (-1e-12).into()] {
            assert_eq!(
                ns(negative),
                Err(Error::Value("Timeout value out of range".into()))
            );
        }
        assert!(matches!(ns(f64::NAN.into()), Err(Error::Value(_))));
        for large in [f64::INFINITY, 9.3e9, 1e300] {
            assert!(
                matches!(ns(large.into()), Err(Error::Overflow(_))),
                "{large}"
            );
        }
        assert!(matches!(ns(u64::MAX.into()), Err(Error::Overflow(_))));
        assert!(matches!(ns(Duration::MAX.into()), Err(Error::Overflow(_))));
    }
}
