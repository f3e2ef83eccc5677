CREATE TABLE `latencies` (
	`minute` integer NOT NULL,
	`tenant` text NOT NULL,
	`version` text NOT NULL,
	`sparsity` real NOT NULL,
	`measure` text NOT NULL,
	`bucket` integer NOT NULL,
	`count` integer NOT NULL,
	PRIMARY KEY(`minute`, `tenant`, `version`, `sparsity`, `measure`, `bucket`)
);
--> statement-breakpoint
CREATE TABLE `variant_latencies` (
	`experiment` text NOT NULL,
	`variant` text NOT NULL,
	`region` text NOT NULL,
	`measure` text NOT NULL,
	`bucket` integer NOT NULL,
	`count` integer NOT NULL,
	PRIMARY KEY(`experiment`, `variant`, `region`, `measure`, `bucket`)
);
--> statement-breakpoint
ALTER TABLE `events` ADD `ttft_bucket` integer;--> statement-breakpoint
ALTER TABLE `events` ADD `tpot_bucket` integer;