//! The language of the steps: the part of Python's syntax that they use.
//!
//! A step is `names = expression`, `del name`, or an expression. This file knows the syntax only.

/// One step.
#[derive(Debug)]
pub struct Step {
    /// The variables that take the value; several take its items.
    pub targets: Vec<String>,
    pub action: Action,
}

#[derive(Debug)]
pub enum Action {
    Evaluate(Expr),
    Delete(String),
}

#[derive(Debug)]
pub enum Expr {
    Int(i64),
    Float(f64),
    Str(String),
    Bytes(Vec<u8>),
    Name(String),
    Tuple(Vec<Expr>),
    Negative(Box<Expr>),
    Binary(char, Box<Expr>, Box<Expr>),
    Attribute(Box<Expr>, String),
    Index(Box<Expr>, usize),
    Call(Call),
}

#[derive(Debug)]
pub struct Call {
    /// What the method belongs to; `None` for a function.
    pub object: Option<Box<Expr>>,
    pub name: String,
    pub args: Vec<Expr>,
    pub keywords: Vec<(String, Expr)>,
}

/// Parses a step; panics on what is no step, since the table is part of the test.
pub fn parse(text: &str) -> Step {
    if let Some(name) = text.strip_prefix("del ") {
        return Step {
            targets: Vec::new(),
            action: Action::Delete(name.to_string()),
        };
    }
    let (targets, expression) = match text.split_once(" = ") {
        Some((names, rest))
            if names
                .chars()
                .all(|c| c.is_alphanumeric() || ", _".contains(c)) =>
        {
            let names = names.split(',').map(|name| name.trim().to_string());
            (names.collect(), rest)
        }
        _ => (Vec::new(), text),
    };
    let mut parser = Parser {
        rest: expression.trim(),
        text,
    };
    let action = Action::Evaluate(parser.expression());
    assert!(parser.rest.is_empty(), "{text}: what is {}", parser.rest);
    Step { targets, action }
}

struct Parser<'a> {
    rest: &'a str,
    text: &'a str,
}

impl Parser<'_> {
    fn fail(&self) -> ! {
        panic!("{}: not understood from {:?} on", self.text, self.rest)
    }

    fn take(&mut self, token: &str) -> bool {
        let rest = self.rest.strip_prefix(token);
        self.rest = rest.map_or(self.rest, str::trim_start);
        rest.is_some()
    }

    fn expect(&mut self, token: &str) {
        if !self.take(token) {
            self.fail();
        }
    }

    fn word(&mut self) -> String {
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let end = self.rest.find(|c| !is_word(c)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest.trim_start();
        word.to_string()
    }

    fn expression(&mut self) -> Expr {
        self.chain("|+", |parser| parser.chain("*", Parser::operand))
    }

    fn chain(&mut self, operators: &str, operand: impl Fn(&mut Self) -> Expr) -> Expr {
        let mut left = operand(self);
        while let Some(operator) = self.rest.chars().next().filter(|c| operators.contains(*c)) {
            self.expect(&operator.to_string());
            let right = operand(self);
            left = Expr::Binary(operator, Box::new(left), Box::new(right));
        }
        left
    }

    fn operand(&mut self) -> Expr {
        let mut expr = self.atom();
        loop {
            if self.take(".") {
                let name = self.word();
                expr = if self.take("(") {
                    self.call(Some(Box::new(expr)), name)
                } else {
                    Expr::Attribute(Box::new(expr), name)
                };
            } else if self.take("[") {
                let index = self.word().parse().unwrap_or_else(|_| self.fail());
                self.expect("]");
                expr = Expr::Index(Box::new(expr), index);
            } else {
                return expr;
            }
        }
    }

    fn atom(&mut self) -> Expr {
        if self.take("-") {
            return Expr::Negative(Box::new(self.operand()));
        }
        if self.take("(") {
            return self.parenthesised();
        }
        if self.rest.starts_with("b\"") {
            self.rest = &self.rest[1..];
            return Expr::Bytes(self.string().into_iter().map(|c| c as u8).collect());
        }
        match self.rest.chars().next() {
            Some('"') => Expr::Str(self.string().into_iter().collect()),
            Some(digit) if digit.is_ascii_digit() => self.number(),
            Some(letter) if letter.is_alphabetic() => {
                let name = self.word();
                if self.take("(") {
                    self.call(None, name)
                } else {
                    Expr::Name(name)
                }
            }
            _ => self.fail(),
        }
    }

    fn parenthesised(&mut self) -> Expr {
        let mut items = Vec::new();
        while !self.take(")") {
            items.push(self.expression());
            if !self.take(",") {
                self.expect(")");
                if items.len() == 1 {
                    return items.remove(0);
                }
                break;
            }
        }
        Expr::Tuple(items)
    }

    fn call(&mut self, object: Option<Box<Expr>>, name: String) -> Expr {
        let (mut args, mut keywords) = (Vec::new(), Vec::new());
        while !self.take(")") {
            let keyword = self.rest.split_once('=').map(|(word, _)| word);
            match keyword.filter(|word| word.chars().all(|c| c.is_alphanumeric() || c == '_')) {
                Some(keyword) => {
                    let keyword = keyword.to_string();
                    self.expect(&format!("{keyword}="));
                    keywords.push((keyword, self.expression()));
                }
                None => args.push(self.expression()),
            }
            if !self.take(",") {
                self.expect(")");
                break;
            }
        }
        Expr::Call(Call {
            object,
            name,
            args,
            keywords,
        })
    }

    fn number(&mut self) -> Expr {
        let end = self
            .rest
            .char_indices()
            .find(|&(at, c)| {
                let exponent = at > 0 && self.rest.as_bytes()[at - 1] == b'e';
                !(c.is_ascii_alphanumeric() || c == '.' || (c == '-' && exponent))
            })
            .map_or(self.rest.len(), |(at, _)| at);
        let (number, rest) = self.rest.split_at(end);
        self.rest = rest.trim_start();
        if let Some(hex) = number.strip_prefix("0x") {
            return Expr::Int(i64::from_str_radix(hex, 16).unwrap());
        }
        match number.parse() {
            Ok(int) => Expr::Int(int),
            Err(_) => Expr::Float(number.parse().unwrap_or_else(|_| self.fail())),
        }
    }

    fn string(&mut self) -> Vec<char> {
        let mut found = Vec::new();
        let mut chars = self.rest[1..].chars();
        loop {
            match chars.next() {
                Some('"') => break,
                Some('\\') => found.push(match chars.next() {
                    Some('0') => '\0',
                    Some('n') => '\n',
                    Some('\\') => '\\',
                    Some('"') => '"',
                    Some('x') => {
                        let digits: String = chars.by_ref().take(2).collect();
                        char::from(u8::from_str_radix(&digits, 16).unwrap())
                    }
                    _ => self.fail(),
                }),
                Some(c) => found.push(c),
                None => self.fail(),
            }
        }
        self.rest = chars.as_str().trim_start();
        found
    }
}
