//! `with_*` methods, as `#[derive(Config)]` of Burn makes them. (The derive itself would make every field required in a
//! file and let unknown ones pass.)

/// A documented `with_*` method for each field.
macro_rules! setters {
    ($($setter:ident($field:ident: $type:ty);)*) => {
        $(
            #[doc = concat!("Sets [`", stringify!($field), "`](Self::", stringify!($field), ").")]
            pub fn $setter(mut self, $field: $type) -> Self {
                self.$field = $field;
                self
            }
        )*
    };
}
pub(crate) use setters;
