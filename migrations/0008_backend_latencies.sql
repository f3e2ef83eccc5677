CREATE TABLE `backend_latencies` (
	`minute` integer NOT NULL,
	`backend` text NOT NULL,
	`measure` text NOT NULL,
	`bucket` integer NOT NULL,
	`count` integer NOT NULL,
	PRIMARY KEY(`minute`, `backend`, `measure`, `bucket`)
);
--> statement-breakpoint
ALTER TABLE `events` ADD `backend` text DEFAULT '' NOT NULL;