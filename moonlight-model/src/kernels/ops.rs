//! The macro by which an operation is declared once.

/// Declares kernels and the operations that are dispatched to them.
///
/// `kernels` lists traits of forward and gradient functions, one trait a kernel. A function without an override runs the
/// function of the same name in `reference`, so a backend implements what it can do faster, in a file of its own. All traits
/// together are the trait `Kernels`, which a backend opts into with an empty `impl`.
///
/// `operations` lists what Burn dispatches: the trait `ModelOps`, implemented for every backend with kernels by the
/// expression that follows a signature (`B` is the backend). Its gradients are `ModelOps` of `Autodiff`, in `autodiff`.
macro_rules! ops {
    (
        kernels {
            $(
                $(#[$doc:meta])*
                trait $kernel:ident {
                    $(
                        $(#[$function_doc:meta])*
                        fn $function:ident($($name:ident: $type:ty),* $(,)?) -> $result:ty;
                    )*
                }
            )*
        }
        operations {
            $( fn $operation:ident($($argument:tt)*) = $forward:expr; )*
        }
    ) => {
        $(
            $(#[$doc])*
            pub(crate) trait $kernel: Backend {
                $(
                    $(#[$function_doc])*
                    fn $function($($name: $type),*) -> $result {
                        reference::$function::<Self>($($name),*)
                    }
                )*
            }
        )*

        /// A backend that has all kernels: its own, or the reference.
        pub(crate) trait Kernels: Backend $(+ $kernel)* {}

        /// The operations as Burn dispatches them; see the public functions of the same names for shapes.
        #[backend_extension(Flex: cfg(feature = "cpu"), Cube: cfg(feature = "cube"), Autodiff)]
        pub(crate) trait ModelOps: Backend {
            $( fn $operation($($argument)*) -> FloatTensor<Self>; )*
        }

        impl<B: Kernels> ModelOps for B {
            $( fn $operation($($argument)*) -> FloatTensor<Self> { $forward } )*
        }
    };
}
pub(super) use ops;
