//! Host names as the domain name system knows them: Python's `idna` codec (RFC 3490, IDNA 2003).
//!
//! Python's rules rather than newer ones, so that a name means the same host in both: `ß` becomes `ss`, where UTS 46 keeps it. The C
//! library's own way (`AI_IDN`) depends on the locale, which a Rust program does not set, and on a library that may be missing.
//! This module knows no lookups.

use stringprep::tables;
use unicode_normalization::UnicodeNormalization;

/// What marks an encoded label.
const ACE_PREFIX: &str = "xn--";

const LABEL_BYTES_MAX: usize = 63;

/// The name in ASCII, each label checked for its length (1 to 63 bytes, the last may be empty); or Python's reason why not.
pub(super) fn encode(name: &str) -> Result<String, String> {
    if name.is_ascii() {
        let mut labels = name.split('.');
        let last = labels.next_back().unwrap_or("");
        if !labels.all(|label| (1..=LABEL_BYTES_MAX).contains(&label.len())) {
            return Err("label empty or too long".into());
        }
        if last.len() > LABEL_BYTES_MAX {
            return Err("label too long".into());
        }
        return Ok(name.into());
    }
    let is_dot = |c| matches!(c, '.' | '\u{3002}' | '\u{ff0e}' | '\u{ff61}');
    let (name, end) = match name.strip_suffix(is_dot) {
        Some(rest) => (rest, "."),
        None => (name, ""),
    };
    let labels: Result<Vec<_>, _> = name.split(is_dot).map(encode_label).collect();
    Ok(labels?.join(".") + end)
}

/// RFC 3490, ToASCII.
fn encode_label(label: &str) -> Result<String, String> {
    let prepared = if label.is_ascii() {
        label.into()
    } else {
        nameprep(label)?
    };
    let encoded = if prepared.is_ascii() {
        prepared
    } else if prepared.starts_with(ACE_PREFIX) {
        return Err("Label starts with ACE prefix".into());
    } else if prepared.chars().nth(LABEL_BYTES_MAX).is_some() {
        // Encoded it is longer still. (Encoding takes time by the square of the length.)
        return Err("label empty or too long".into());
    } else {
        ACE_PREFIX.to_owned() + &punycode(&prepared)
    };
    if !(1..=LABEL_BYTES_MAX).contains(&encoded.len()) {
        return Err("label empty or too long".into());
    }
    Ok(encoded)
}

/// RFC 3491. Characters that Unicode 3.2 did not have are let through, as in Python.
fn nameprep(label: &str) -> Result<String, String> {
    let prepared: String = label
        .chars()
        .filter(|&c| !tables::commonly_mapped_to_nothing(c))
        .flat_map(tables::case_fold_for_nfkc)
        .nfkc()
        .collect();
    let is_prohibited = |c| {
        tables::non_ascii_space_character(c)
            || tables::non_ascii_control_character(c)
            || tables::private_use(c)
            || tables::non_character_code_point(c)
            || tables::inappropriate_for_plain_text(c)
            || tables::inappropriate_for_canonical_representation(c)
            || tables::change_display_properties_or_deprecated(c)
            || tables::tagging_character(c)
    };
    if let Some(c) = prepared.chars().find(|&c| is_prohibited(c)) {
        // As Python writes it.
        return Err(match u32::from(c) {
            code @ ..=0xff => format!("Invalid character '\\x{code:02x}'"),
            code @ ..=0xffff => format!("Invalid character '\\u{code:04x}'"),
            code => format!("Invalid character '\\U{code:08x}'"),
        });
    }
    if prepared.chars().any(tables::bidi_r_or_al) {
        if prepared.chars().any(tables::bidi_l) {
            return Err("Violation of BIDI requirement 2".into());
        }
        let ends = [prepared.chars().next(), prepared.chars().next_back()];
        if !ends.into_iter().flatten().all(tables::bidi_r_or_al) {
            return Err("Violation of BIDI requirement 3".into());
        }
    }
    Ok(prepared)
}

/// RFC 3492, section 6.3, with the parameters of section 5.
fn punycode(label: &str) -> String {
    const BASE: u64 = 36;
    const T_MIN: u64 = 1;
    const T_MAX: u64 = 26;
    let mut encoded: String = label.chars().filter(char::is_ascii).collect();
    let basic = encoded.len() as u64;
    if basic > 0 {
        encoded.push('-');
    }
    let total = label.chars().count() as u64;
    let (mut code, mut delta, mut bias, mut handled) = (128, 0, 72, basic);
    while handled < total {
        let rest = label.chars().map(u64::from).filter(|&c| c >= code);
        let least = rest.min().expect("characters are left to encode");
        delta += (least - code) * (handled + 1);
        code = least;
        for c in label.chars().map(u64::from) {
            if c < code {
                delta += 1;
            }
            if c != code {
                continue;
            }
            let mut rest = delta;
            for k in (BASE..).step_by(BASE as usize) {
                let threshold = k.saturating_sub(bias).clamp(T_MIN, T_MAX);
                if rest < threshold {
                    encoded.push(digit(rest));
                    break;
                }
                let span = BASE - threshold;
                encoded.push(digit(threshold + (rest - threshold) % span));
                rest = (rest - threshold) / span;
            }
            // The next bias, section 6.1.
            let damp = if handled == basic { 700 } else { 2 };
            let mut scaled = delta / damp;
            scaled += scaled / (handled + 1);
            bias = 0;
            while scaled > (BASE - T_MIN) * T_MAX / 2 {
                scaled /= BASE - T_MIN;
                bias += BASE;
            }
            bias += (BASE - T_MIN + 1) * scaled / (scaled + 38);
            delta = 0;
            handled += 1;
        }
        delta += 1;
        code += 1;
    }
    encoded
}

fn digit(value: u64) -> char {
    char::from(b"abcdefghijklmnopqrstuvwxyz0123456789"[value as usize])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn names_are_encoded_as_python_encodes_them() {
        let long = [
            "x".repeat(63),
            "x".repeat(64),
            "ü".repeat(50),
            "ü".repeat(64),
        ];
        let mut names = vec![
            "localhost",
            "localhost.",
            "a..b",
            ".a",
            ".",
            "..",
            "a.",
            "ü.",
            "ü..",
            "ü..a",
            ".ü",
            "ü",
            "straße.faß.ς.例え。テスト．com。",
            "xn--ü",
            "BÜCHER.de",
            "\u{ad}ü",
            "\u{ad}",
            "ü\u{2028}a",
            "אü",
            "א1",
            "1א",
            "אב",
            "א1ב",
            "\u{1f600}",
            "\u{221}",
            "ﬁü",
            "Ｆullwidth",
            "他们为什么不说中文",
            "3年B組金八先生",
            "ü\u{e000}",
            "ü-x-é",
            "пример.испытание",
            "ü\u{340}",
            "a\u{e0001}",
            "İ.tr",
            "Pročprostěnemluvíčesky",
        ];
        names.extend(long.iter().map(String::as_str));
        let script = "
import sys
for name in sys.argv[1:]:
    try: print(name.encode('idna').decode())
    except UnicodeError as e: print('!', e)
";
        let output = Command::new("python3")
            .args(["-X", "utf8", "-c", script])
            .args(&names)
            .output();
        let Ok(output) = output else {
            println!("skipped: there is no python3 to compare with");
            return;
        };
        assert!(output.status.success());
        let python = String::from_utf8(output.stdout).unwrap();
        assert_eq!(python.lines().count(), names.len());
        for (name, python) in names.iter().zip(python.lines()) {
            let python = match python.strip_prefix("! ") {
                // As the codec's machinery wraps it.
                Some(error) => Err(error
                    .rsplit_once("UnicodeError: ")
                    .map_or(error, |(_, e)| e.trim_end_matches(')'))),
                None => Ok(python),
            };
            let ours = encode(name);
            assert_eq!(ours.as_deref().map_err(String::as_str), python, "{name:?}");
        }
    }
}
